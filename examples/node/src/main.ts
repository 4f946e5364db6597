// A worker with some tasks:  NATS_URL=nats://127.0.0.1:4222 npm start -- <queue>

import { connectAsTold } from "./protocol.js";
import { Fail, Worker } from "./worker.js";
import type { Context, Tasks } from "./worker.js";

const tasks = {
  async add(_context: Context, a: number, b: number) {
    return a + b;
  },

  async flaky(context: Context, failures: number) {
    const attempt = (context.job.retries ?? 0) + 1;
    if (attempt <= failures) throw new Error(`attempt ${attempt}`);
    return `after ${failures} failures`;
  },

  async refuse(_context: Context, reason: string) {
    throw new Fail(reason); // no more attempts
  },

  async count(context: Context, steps: number) {
    for (let step = 1; step <= steps; step++) await context.progress(step / steps, { step });
    return steps;
  },

  /** Runs until it is cancelled. */
  async forever(context: Context) {
    await new Promise((_, reject) =>
      context.signal.addEventListener("abort", () => reject(context.signal.reason)),
    );
  },
} satisfies Tasks;

const queue = process.argv[2] ?? "node";
const nc = await connectAsTold();
const worker = await Worker.start(nc, queue, tasks);
console.log(`worker ${worker.id} runs queue ${queue}`);
for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => worker.stop());
await Promise.race([worker.stopped, nc.closed()]);
if (nc.isClosed()) {
  console.error("the server is gone"); // a supervisor starts this program again
  process.exit(1);
}
await nc.drain();
