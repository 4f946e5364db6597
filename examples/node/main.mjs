// A worker with some tasks:  NATS_URL=nats://127.0.0.1:4222 node main.mjs <queue>

import { connectAsTold } from "./protocol.mjs";
import { Fail, Worker } from "./worker.mjs";

const tasks = {
  async add(_context, a, b) {
    return a + b;
  },

  async flaky(context, failures) {
    if ((context.job.retries ?? 0) < failures) throw new Error(`attempt ${(context.job.retries ?? 0) + 1}`);
    return `after ${failures} failures`;
  },

  async refuse(_context, reason) {
    throw new Fail(reason); // no more attempts
  },

  async count(context, steps) {
    for (let step = 1; step <= steps; step++) await context.progress(step / steps, { step });
    return steps;
  },

  /** Runs until it is cancelled. */
  async forever(context) {
    await new Promise((_, reject) => context.signal.addEventListener("abort", () => reject(context.signal.reason)));
  },
};

const queue = process.argv[2] ?? "node";
const nc = await connectAsTold();
const worker = new Worker(nc, queue, tasks);
await worker.start();
console.log(`worker ${worker.id} runs queue ${queue}`);
for (const signal of ["SIGINT", "SIGTERM"]) {
  process.once(signal, async () => {
    await worker.stop();
    await nc.drain();
  });
}
await nc.closed();
