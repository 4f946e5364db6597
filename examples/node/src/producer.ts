// Adds a job and follows it until it ends:
//
//     npm run --silent produce -- <queue> <task> '<JSON array of arguments>' ['<more fields>']

import { jetstream } from "@nats-io/jetstream";
import { connectAsTold, makeHeaders, Names, tokenOf } from "./protocol.js";
import { parseEvent } from "./wire.js";
import type { Job } from "./wire.js";

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

follow: for await (const message of messages) {
  if (message.headers?.has("KV-Operation")) continue; // something was removed
  const event = parseEvent(message.subject.split(".")[3] ?? "", message.data);
  if (event === undefined) continue;
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
