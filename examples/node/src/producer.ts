// Adds a job and follows it until it ends:
//
//     npm run --silent produce -- <queue> <task> '<JSON array of arguments>' ['<more fields>']

import { setTimeout } from "node:timers/promises";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { TimeoutError } from "@nats-io/transport-node";
import { connectAsTold, makeHeaders, Names, readLast, tokenOf } from "./protocol.js";
import { parseEvent } from "./wire.js";
import type { Event, Job } from "./wire.js";

/** Milliseconds without an event after which the outcome is read. */
const PATIENCE = 3000;

const [queue, task, args = "[]", more = "{}"] = process.argv.slice(2);
if (queue === undefined || task === undefined) {
  console.error("usage: producer <queue> <task> [<arguments>] [<fields>]");
  process.exit(2);
}
const nc = await connectAsTold();
const names = new Names(queue);
const id = crypto.randomUUID();
const job: Job = {
  v: 1,
  id,
  task,
  args: JSON.parse(args),
  max_retries: 3,
  backoff: 2,
  ...(JSON.parse(more) as Partial<Job>),
};

// Subscribe first: events are told once.
const messages = nc.subscribe(names.event("*", tokenOf(id)));
await nc.flush();
await jetstream(nc).publish(names.ready(job.priority ?? 5, tokenOf(id)), JSON.stringify(job), {
  headers: makeHeaders({ id }), // makes it safe to publish again
});
console.log(`added ${id}`);

follow: for await (const event of follow()) {
  console.log(event.what === "progress" ? `progress ${event.body.progress}` : event.what);
  switch (event.what) {
    case "completed":
      console.log(`result ${JSON.stringify(event.body.result)}`);
      break follow;
    case "failed":
    case "expired":
    case "cancelled":
      console.log(event.body.last_error ?? "");
      break follow;
  }
}
await nc.close();

/** The events. They are lost with a connection: without one for a while, the outcome is read. */
async function* follow(): AsyncGenerator<Event> {
  const told = messages[Symbol.asyncIterator]();
  let next = told.next();
  for (;;) {
    const result = await Promise.race([next, setTimeout(PATIENCE)]);
    if (result === undefined) {
      yield* await readOutcome();
      continue;
    }
    if (result.done) return;
    next = told.next();
    const { subject, headers, data } = result.value;
    if (headers?.has("KV-Operation")) continue; // something was removed
    const event = parseEvent(subject.split(".")[3] ?? "", data);
    if (event !== undefined) yield event;
  }
}

/** The event of the end of the job; nothing if it has not ended, or no server answers. */
async function readOutcome(): Promise<Event[]> {
  const keys = ["completed", "failed", "expired", "cancelled"].map((what) =>
    names.key(`done.${tokenOf(id)}.${what}`),
  );
  try {
    const jsm = await jetstreamManager(nc, { checkAPI: false });
    const found = await readLast(jsm, names.bucketStream, keys);
    return found
      .filter(({ removed }) => !removed)
      .flatMap(({ subject, data }) => parseEvent(subject.split(".").at(-1) ?? "", data) ?? []);
  } catch (error) {
    if (error instanceof TimeoutError) return [];
    throw error;
  }
}
