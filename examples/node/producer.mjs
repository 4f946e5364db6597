// Adds a job and follows it until it ends:
//
//     NATS_URL=nats://127.0.0.1:4222 node producer.mjs <queue> <task> '<JSON array of arguments>' [<JSON of more fields>]

import { jetstream } from "@nats-io/jetstream";
import { connectAsTold, makeHeaders, Names, tokenOf } from "./protocol.mjs";

const [queue, task, args = "[]", more = "{}"] = process.argv.slice(2);
if (task === undefined) {
  console.error("usage: node producer.mjs <queue> <task> [<arguments>] [<fields>]");
  process.exit(2);
}
const nc = await connectAsTold();
const names = new Names(queue);
const id = crypto.randomUUID();
const job = { v: 1, id, task, args: JSON.parse(args), max_retries: 3, backoff: 2, ...JSON.parse(more) };

// Subscribe first: events are told once.
const events = nc.subscribe(names.event("*", tokenOf(id)));
await nc.flush();
await jetstream(nc).publish(names.ready(job.priority ?? 5, tokenOf(id)), JSON.stringify(job), {
  headers: makeHeaders({ id }), // makes it safe to publish again
});
console.log(`added ${id}`);
for await (const event of events) {
  if (event.headers?.has("KV-Operation")) continue; // something was removed
  const what = event.subject.split(".")[3];
  if (what === "progress") console.log(`progress ${event.json().progress}`);
  else console.log(what);
  if (what === "completed") console.log(`result ${JSON.stringify(event.json().result)}`);
  if (["failed", "expired", "cancelled"].includes(what)) console.log(event.json().last_error ?? "");
  if (["completed", "failed", "expired", "cancelled"].includes(what)) break;
}
await nc.close();
