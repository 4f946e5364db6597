// BullMQ on Redis: results are kept. Node.js; the same two roles and lines as `adapter.py` has.

import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const given = process.env;
const require = createRequire(`${given.PEER_MODULES}/`);
const { Queue, Worker } = require("bullmq");

const PRODUCERS = 100;
const WARM_UP = -1;
const JOBS = Number(given.PEER_JOBS ?? 0);
const CONCURRENCY = Number(given.PEER_CONCURRENCY ?? 1);
const SECONDS = Number(given.PEER_SECONDS ?? Infinity);

const server = new URL(given.PEER_URL);
const connection = { host: server.hostname, port: Number(server.port) };

const tell = (line) => process.stdout.write(`@${JSON.stringify(line)}\n`);
const seconds = () => performance.now() / 1000;

function cpuSeconds(process) {
  const threads = readdirSync(`/proc/${process}/task`);
  const used = threads.map((thread) =>
    Number(readFileSync(`/proc/${process}/task/${thread}/schedstat`, "utf8").split(" ")[0]),
  );
  return used.reduce((sum, each) => sum + each, 0) / 1e9;
}

// -- the worker

const left = new Set(Array(JOBS).keys());
const warm = JOBS - Math.min(2 * CONCURRENCY, Math.floor(JOBS / 2));
const late = [];
let begun = 0;
let used = [];
let over = false;

const readCpu = () => [cpuSeconds(process.pid), cpuSeconds(given.PEER_SERVER)];

async function noOperation({ data: { number, due } }) {
  if (number === WARM_UP) tell({ event: "ready" });
  else if (!over && left.delete(number)) note(due);
  return number;
}

function note(due) {
  if (due) late.push(Date.now() / 1000 - due);
  if (left.size === warm) {
    used = readCpu();
    begun = seconds();
  } else if (begun && (left.size === 0 || seconds() - begun > SECONDS)) {
    over = true;
    const took = seconds() - begun;
    const [worker, served] = readCpu().map((now, index) => now - used[index]);
    tell({ event: "over", jobs: warm - left.size, seconds: took, worker, server: served, late });
  }
}

function work() {
  new Worker(given.PEER_QUEUE, noOperation, { connection, concurrency: CONCURRENCY });
}

// -- the producer

const queues = new Map();

function queueOf(name) {
  if (!queues.has(name)) queues.set(name, new Queue(name, { connection }));
  return queues.get(name);
}

const add = (queue, number) => queueOf(queue).add("no_operation", { number, due: 0 });

function* numbers(jobs, limit) {
  const end = seconds() + limit;
  for (let number = 0; number < jobs && seconds() <= end; number++) yield number;
}

async function addEach(queue, jobs) {
  let added = 0;
  for (const number of jobs) {
    await add(queue, number);
    added++;
  }
  return added;
}

const commands = {
  warm_up: ({ queue }) => add(queue, WARM_UP),
  add_one_by_one: ({ queue, jobs, seconds }) => addEach(queue, numbers(jobs, seconds)),
  async add_100_at_once({ queue, jobs, seconds }) {
    const left = numbers(jobs, seconds);
    const added = await Promise.all(Array.from({ length: PRODUCERS }, () => addEach(queue, left)));
    return added.reduce((sum, each) => sum + each, 0);
  },
  async add_bulk({ queue, jobs }) {
    const job = (number) => ({ name: "no_operation", data: { number, due: 0 } });
    await queueOf(queue).addBulk([...Array(jobs).keys()].map(job));
    return jobs;
  },
  async add_due({ queue, jobs, due }) {
    for (let number = 0; number < jobs; number++) {
      const delay = due * 1000 - Date.now();
      await queueOf(queue).add("no_operation", { number, due }, { delay });
    }
    return jobs;
  },
};

async function produce() {
  const versions = { bullmq: require("bullmq/package.json").version, node: process.versions.node };
  tell({ versions });
  for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line);
    const started = seconds();
    const jobs = await commands[command.what](command);
    tell({ jobs, seconds: seconds() - started });
  }
}

if (process.argv[2] === "work") work();
else await produce();
