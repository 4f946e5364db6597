// A client of a queue in JavaScript, with the @nats-io packages and docs/protocol.md alone: it adds jobs, follows their events and reads a
// result from the KV bucket. Prints one JSON object.
//
//     node client.mjs <server> <queue>
import { randomUUID } from "node:crypto";
import { createRequire } from "node:module";
import { join } from "node:path";

const load = createRequire(join(process.cwd(), "package.json"));
const { connect } = load("@nats-io/transport-node");
const { jetstream } = load("@nats-io/jetstream");
const { Kvm } = load("@nats-io/kv");

const [server, queue] = process.argv.slice(2);
const url = new URL(server);  // an embedded server has a token in its address
const client = await connect({ servers: url.host, token: url.username || undefined });
const ids = [randomUUID(), randomUUID(), randomUUID()];
const seen = Object.fromEntries(ids.map((id) => [id, []]));
let results = {};

const events = client.subscribe(`amq.${queue}.event.>`);
client.publish(`amq.${queue}.control.listen`);  // so workers tell of starts at once
await client.flush();
const followed = (async () => {
  const missing = new Set(ids);
  for await (const message of events) {
    const [, , , what, id] = message.subject.split(".");
    if (!(id in seen) || message.data.length === 0) continue;
    seen[id].push(what);
    if (what === "completed" || what === "failed") {
      results[id] = message.json().result;
      missing.delete(id);
      if (missing.size === 0) return;
    }
  }
})();

const js = jetstream(client);
const jobs = [
  { task: "echo", args: ["ä ✓"] },
  { task: "echo", kwargs: { value: { nested: [1, null] } } },
  { task: "echo", args: ["later"], delay_until: Date.now() / 1000 + 0.5 },
];
for (const [index, job] of jobs.entries()) {
  const body = JSON.stringify({ v: 1, id: ids[index], max_retries: 0, ...job });
  const first = await js.publish(`amq.${queue}.ready.5.${ids[index]}`, body, { msgID: ids[index] });
  const second = await js.publish(`amq.${queue}.ready.5.${ids[index]}`, body, { msgID: ids[index] });
  if (first.duplicate || !second.duplicate) throw new Error("a second publish under one message id must change nothing");
}
await followed;

const bucket = await new Kvm(js).open(`amq_${queue}_scheduler`);
const outcome = (await bucket.get(`done.${ids[0]}.completed`)).json();
console.log(JSON.stringify({ ids, seen, results, outcome }));
await client.close();
