// A worker, after docs/protocol.md: it runs the jobs of one queue.
//
// The queue must be there: Python makes it. What it leaves to Python's workers: repeatables, and
// jobs that others depend on, whose children they release.

import { hostname } from "node:os";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { blake2b } from "@noble/hashes/blake2b";
import { bytesToHex, utf8ToBytes } from "@noble/hashes/utils";
import {
  idOf, makeHeaders, Names, now, parseObject, readLast, tokenOf, WRONG_LAST_SEQUENCE,
} from "./protocol.mjs";

const DAY = 86_400;
const LEAD = 0.4; // seconds by which timers are early
const CLAIM_AFTER = 1000; // ms
const MAX_STALLS = 3;
const OUTCOMES = ["completed", "failed", "expired", "cancelled"];
const HEARTBEAT = 5; // seconds

/** Raised by a task: no more attempts. */
export class Fail extends Error {}

const isRefused = (error) => error.code === WRONG_LAST_SEQUENCE;
const orderOf = (job) => [job?.reruns ?? 0, (job?.retries ?? 0) + (job?.put_offs ?? 0)];
const isLater = ([a, b], [c, d]) => a > c || (a === c && b > d);

/** Seconds before the n-th retry. */
export function backoffDelay(backoff, n) {
  if (backoff === null) return 0;
  if (backoff === undefined) return 1.5 ** n;
  if (typeof backoff === "number") return backoff ** n;
  const { kind = "exponential", delay = 1, factor = 2, maximum = null, jitter = 0 } = backoff;
  const wanted = kind === "fixed" ? delay : delay * factor ** (n - 1);
  return Math.min(wanted, maximum ?? 365 * DAY) * (1 - jitter * Math.random());
}

/** Runs the jobs of one queue: `tasks` are functions by their ids, called as `task(context, ...args)`. */
export class Worker {
  constructor(nc, queue, tasks, { concurrency = 10, prefix = "amq" } = {}) {
    this.id = `${hostname()}-${process.pid}-${crypto.randomUUID().slice(0, 6)}`.replaceAll(".", "-");
    this.nc = nc;
    this.names = new Names(queue, prefix);
    this.tasks = tasks;
    this.concurrency = concurrency;
    this.running = new Map(); // id → AbortController
    this.held = new Set(); // messages on lease
    this.waiting = []; // those who wait for a slot
    this.free = concurrency;
    this.pulls = [];
    this.timers = [];
    this.stopping = false;
  }

  /** Start; what it returns resolves when the worker takes jobs. */
  async start() {
    this.js = jetstream(this.nc);
    this.jsm = await jetstreamManager(this.nc);
    const { names } = this;
    const tiers = [];
    for await (const consumer of this.jsm.consumers.list(names.readyStream)) {
      if (/^tier_-?\d+$/.test(consumer.name)) tiers.push(consumer);
    }
    this.lease = Math.min(...tiers.map((tier) => tier.config.ack_wait / 1e6)); // ms
    this.#every(this.lease / 3, () => this.held.forEach((message) => message.working()));
    this.nc.subscribe(names.control("cancel"), {
      callback: (_, message) => this.running.get(message.string())?.abort(new Error("cancelled")),
    });
    for (const tier of tiers) await this.#pull(names.readyStream, tier.name, (m) => this.#take(m));
    this.secret = await this.#readSecret();
    await this.#pull(names.bucketStream, "promoter", (message) => this.#promote(message));
    this.since = now();
    await this.#heartbeat();
    this.#every(HEARTBEAT * 1000, () => this.#heartbeat());
  }

  /** Stop in order: running jobs finish, the others are handed back. */
  async stop() {
    this.stopping = true;
    for (const pull of this.pulls) await pull.close();
    this.waiting.splice(0).forEach((give) => give(false));
    while (this.running.size) await new Promise((done) => setTimeout(done, 10));
    this.timers.forEach(clearInterval);
  }

  #every(milliseconds, act) {
    this.timers.push(setInterval(() => Promise.resolve(act()).catch(console.error), milliseconds));
  }

  async #pull(stream, name, act) {
    const consumer = await this.js.consumers.get(stream, name);
    const messages = await consumer.consume({ max_messages: this.concurrency });
    this.pulls.push(messages);
    (async () => {
      for await (const message of messages) {
        this.held.add(message);
        act(message)
          .catch((error) => console.error(`${message.subject}: ${error}`)) // comes again
          .finally(() => this.held.delete(message));
      }
    })();
  }

  async #readSecret() {
    const [record] = await readLast(this.jsm, this.names.bucketStream, [this.names.key("queue.secret")]);
    if (record !== undefined) return record.data.slice(0, 64);
    const secret = utf8ToBytes(bytesToHex(crypto.getRandomValues(new Uint8Array(32))));
    const key = this.names.key("queue.secret");
    try {
      await this.#write("queue.secret", secret, { expect: [key, 0] });
      return secret;
    } catch (error) {
      if (!isRefused(error)) throw error;
      return this.#readSecret();
    }
  }

  #heartbeat() {
    const entry = {
      id: this.id, queue: this.names.queue, concurrency: this.concurrency, host: hostname(),
      pid: process.pid, since: this.since, running: [...this.running.keys()].slice(0, 100), repeatables: [],
    };
    const options = { headers: makeHeaders({ ttl: 3 * HEARTBEAT, rollup: true }) };
    return this.js.publish(`${this.names.workers}.${tokenOf(this.id)}`, JSON.stringify(entry), options);
  }

  #write(key, body, options) {
    const data = body instanceof Uint8Array ? body : JSON.stringify(body);
    return this.js.publish(this.names.key(key), data, { headers: makeHeaders(options) });
  }

  async #slot() {
    if (this.stopping) return false;
    if (this.free > 0) return this.free--, true;
    return new Promise((give) => this.waiting.push(give));
  }

  #freeSlot() {
    const next = this.waiting.shift();
    if (next === undefined) this.free++;
    else next(true);
  }

  // -- one delivery

  async #take(message) {
    if (!(await this.#slot())) return message.nak();
    try {
      const attempt = await this.#open(message);
      if (attempt !== undefined) await this.#run(attempt);
    } finally {
      this.#freeSlot();
    }
  }

  /** Read the job, and on a redelivery what is stored of it; undefined if there is nothing to run. */
  async #open(message) {
    const [priority, token] = message.subject.split(".").slice(3);
    const attempt = { message, token, id: idOf(token), expect: 0, stalls: 0, lost: false, edges: false };
    const job = parseObject(message.data);
    if (message.info.deliveryCount > 1 && !(await this.#claim(attempt, job))) return undefined;
    if (job === undefined || typeof job.task !== "string") {
      attempt.job = { v: 1, id: attempt.id, task: "?", body: message.string().slice(0, 100_000) };
      await this.#fail(attempt, "this is no job", "");
      return undefined;
    }
    attempt.job = { created_at: message.info.timestampNanos / 1e9, ...job, id: attempt.id, priority: Number(priority) };
    return attempt;
  }

  /** Decide whether this redelivery may run, and say so in a claim. */
  async #claim(attempt, job) {
    const { message, token } = attempt;
    const key = this.names.key;
    const records = await readLast(this.jsm, this.names.bucketStream, [
      key(`later.${token}.>`), key(`done.${token}.>`),
    ]);
    const there = records.filter((record) => !record.removed);
    attempt.edges = there.some((record) => record.subject.includes(".awaited."));
    if (OUTCOMES.some((state) => there.some((record) => record.subject === key(`done.${token}.${state}`)))) {
      return this.#acknowledge(attempt, job), false; // only the ack was lost
    }
    const later = there.find((record) => record.subject.startsWith(key(`later.${token}.`)));
    if (later !== undefined && isLater(orderOf(parseObject(later.data)), orderOf(job))) {
      return message.ack(), false; // the next attempt is under way
    }
    const mine = [message.info.streamSequence, message.info.deliveryCount];
    const record = there.find((each) => each.subject === key(`done.${token}.claim`));
    const claim = record && parseObject(record.data);
    if (claim && claim.message === mine[0]) {
      if (claim.delivery >= mine[1]) return false; // another worker has it: no ack
      attempt.stalls = claim.stalls + (claim.released ? 0 : 1);
    }
    attempt.expect = Math.max(0, ...records.filter((r) => r.subject.startsWith(key("done."))).map((r) => r.sequence));
    try {
      await this.#writeClaim(attempt);
    } catch (error) {
      if (isRefused(error)) return message.nak(50), false; // somebody else wrote: look again
      throw error;
    }
    if (attempt.stalls < MAX_STALLS) return true;
    attempt.job = { ...job, id: attempt.id };
    await this.#fail(attempt, `its worker was lost ${attempt.stalls} times`, "");
    return false;
  }

  async #writeClaim(attempt) {
    const { streamSequence, deliveryCount } = attempt.message.info;
    const claim = {
      worker: this.id, message: streamSequence, delivery: deliveryCount, stalls: attempt.stalls, released: false,
    };
    const key = `done.${attempt.token}`;
    const expect = [this.names.key(`${key}.>`), attempt.expect];
    attempt.expect = (await this.#write(`${key}.claim`, claim, { expect, ttl: DAY, rollup: true })).seq;
    attempt.claimed = attempt.expect;
  }

  async #run(attempt) {
    const { job, id, token } = attempt;
    attempt.started = now();
    if (job.delay_until > attempt.started) return this.#reschedule(attempt, {}, job.delay_until);
    if (job.ttl != null && attempt.started - job.created_at > job.ttl) {
      return this.#end(attempt, "expired", { last_error: `its time to live of ${job.ttl} s was over` });
    }
    const task = this.tasks[job.task];
    if (task === undefined || (job.v ?? 1) > 1) return this.#putOff(attempt, `no task ${job.task} here`);
    const abort = new AbortController();
    this.running.set(id, abort);
    this.nc.publish(this.names.event("started", token), JSON.stringify({ ...job, active_since: attempt.started, worker: this.id }));
    // A claim says that it ran, should this worker be lost.
    const timer = setTimeout(() => {
      if (!attempt.claimed) attempt.claiming = this.#writeClaim(attempt).catch(() => {});
    }, CLAIM_AFTER);
    let limit;
    try {
      if (job.timeout != null) {
        limit = setTimeout(() => abort.abort(new Error(`it ran longer than ${job.timeout} s`)), job.timeout * 1000);
      }
      const aborted = new Promise((_, reject) =>
        abort.signal.addEventListener("abort", () => reject(abort.signal.reason), { once: true }),
      );
      const context = {
        job, signal: abort.signal, progress: (share, data = null) => this.#report(attempt, share, data),
      };
      const result = await Promise.race([task(context, ...(job.args ?? [])), aborted]);
      clearTimeout(timer);
      await attempt.claiming;
      await this.#end(attempt, "completed", { result: result ?? null });
    } catch (error) {
      clearTimeout(timer);
      await attempt.claiming;
      await this.#failed(attempt, error);
    } finally {
      clearTimeout(timer);
      clearTimeout(limit);
      this.running.delete(id);
    }
  }

  #report(attempt, progress, data) {
    const body = JSON.stringify({ id: attempt.id, progress, data });
    this.nc.publish(this.names.event("progress", attempt.token), body);
    return this.#write(`progress.${attempt.token}`, new TextEncoder().encode(body), { ttl: DAY, rollup: true });
  }

  // -- how an attempt ends

  async #failed(attempt, error) {
    const { job } = attempt;
    const attempts = (job.retries ?? 0) + 1;
    const text = `${error?.name ?? "Error"}: ${error?.message ?? error}`;
    if (error instanceof Fail || attempts > (job.max_retries ?? 3)) return this.#fail(attempt, text, error?.stack ?? "");
    const next = this.#noted(attempt, text, error?.stack ?? "");
    const delay = backoffDelay(job.backoff, attempts);
    return this.#reschedule(attempt, next, delay > 0 ? now() + delay : null);
  }

  #noted(attempt, error, traceback) {
    const { job } = attempt;
    const retries = (job.retries ?? 0) + 1;
    const failure = { attempt: retries, error, traceback, at: now() };
    return { retries, errors: [...(job.errors ?? []), failure].slice(-10) };
  }

  #fail(attempt, error, traceback) {
    const noted = this.#noted(attempt, error, traceback);
    return this.#end(attempt, "failed", { ...noted, last_error: error, error_traceback: traceback });
  }

  async #putOff(attempt, reason) {
    const { job } = attempt;
    const since = job.put_off_since ?? now();
    if (now() - since > 3600) return this.#fail(attempt, reason, "");
    const fields = { put_offs: (job.put_offs ?? 0) + 1, put_off_since: since, put_off_reason: reason };
    return this.#reschedule(attempt, fields, now() + Math.min(60, Math.max(1, now() - since)));
  }

  /** Write the outcome; if it is refused, another end is there, or a child came to wait for this job. */
  async #end(attempt, state, fields) {
    const { job, token } = attempt;
    const outcome = {
      ...job, status: state, ...fields, active_since: attempt.started ?? null, finished_at: now(), worker: this.id,
    };
    const ttl = state === "completed" ? DAY : 30 * DAY;
    if (state !== "completed") await this.#write(`index.${state}.${token}.entry`, new Uint8Array(), { ttl, rollup: true });
    await this.#finish(attempt, `done.${token}.${state}`, outcome, { ttl });
  }

  async #reschedule(attempt, fields, runAt) {
    const { job, token } = attempt;
    const { put_offs, put_off_since, put_off_reason, ...rest } = job;
    const next = { ...rest, ...(put_offs ? { put_offs } : {}), ...fields, delay_until: runAt };
    const released = `later.${token}.released`;
    if (runAt === null || runAt - LEAD <= now()) return this.#finish(attempt, released, next, {});
    const timer = { at: runAt - LEAD, target: this.names.key(released) };
    await this.#finish(attempt, `later.${token}.delayed`, next, { timer, rollup: true });
  }

  async #finish(attempt, key, body, options) {
    const { message, token, job } = attempt;
    const filter = this.names.key(`done.${token}.>`);
    for (;;) {
      try {
        await this.#write(key, body, { ...options, expect: [filter, attempt.expect] });
        break;
      } catch (error) {
        if (!isRefused(error)) throw error;
      }
      const records = await readLast(this.jsm, this.names.bucketStream, [filter]);
      const there = records.filter((record) => !record.removed);
      const words = there.map((record) => record.subject.split(".").slice(4).join("."));
      attempt.edges = words.some((word) => word.startsWith("awaited."));
      if (OUTCOMES.some((state) => words.includes(state))) break; // the first outcome wins
      const claim = there.find((record) => record.subject.endsWith(".claim"));
      const { message: sequence, delivery } = (claim && parseObject(claim.data)) ?? {};
      const { streamSequence, deliveryCount } = message.info;
      if (sequence > streamSequence || (sequence === streamSequence && delivery > deliveryCount)) return;
      attempt.expect = Math.max(...records.map((record) => record.sequence));
    }
    if (attempt.claimed) await this.jsm.streams.deleteMessage(this.names.bucketStream, attempt.claimed, false).catch(() => {});
    if (key.startsWith("done.")) this.#acknowledge(attempt, job);
    else message.ack();
  }

  /** Acknowledge a job that has ended; one that others wait for is left to Python's workers, who tell these. */
  #acknowledge(attempt, job) {
    if (attempt.edges || job?.children?.length) attempt.message.nak(Math.min(100 * attempt.message.info.deliveryCount, 5000));
    else attempt.message.ack();
  }

  // -- released jobs become ready

  async #promote(message) {
    const [kind, token, place] = message.subject.split(".").slice(2);
    const job = parseObject(message.data);
    if (message.headers?.has("KV-Operation")) return message.ack();
    const mine = kind === "later" && place === "released" && job !== undefined && !job.parents?.length && !job.wide;
    if (!mine) return message.nak(Math.min(100 * message.info.deliveryCount, 5000)); // Python's workers know how
    const { names } = this;
    const wait = (job.delay_until ?? 0) - now();
    if (wait > 0) await new Promise((done) => setTimeout(done, wait * 1000));
    const sequence = message.info.streamSequence;
    const records = await readLast(this.jsm, names.bucketStream, [names.key(`later.${token}.>`), names.key(`done.${token}.>`)]);
    const there = records.filter((record) => !record.removed);
    const outcome = there.find((each) => OUTCOMES.includes(each.subject.split(".")[4]) && each.subject.startsWith(names.key("done.")));
    if (outcome !== undefined && orderOf(parseObject(outcome.data))[0] < orderOf(job)[0]) {
      return message.nak(100); // a retry by hand that is unfinished
    }
    const current = there.some((record) => record.sequence === sequence);
    const superseded = there.some(
      (each) => each.subject === names.key(`later.${token}.delayed`) && isLater(orderOf(parseObject(each.data)), orderOf(job)),
    );
    if (outcome === undefined && current && !superseded) {
      const { delay_until, ...body } = job;
      if (!(await this.#makeReady(token, body, message))) return message.nak(50);
    }
    await this.jsm.streams.deleteMessage(names.bucketStream, sequence, false).catch(() => {});
    message.ack();
  }

  async #makeReady(token, job, message) {
    const { names } = this;
    const { streamSequence, timestampNanos } = message.info;
    const at = timestampNanos / 1e9;
    const parts = ["released", String(streamSequence), Number.isInteger(at) ? `${at}.0` : String(at)];
    const id = bytesToHex(blake2b(utf8ToBytes(parts.join("\0")), { key: this.secret, dkLen: 16 }));
    const expect = [names.ready("*", token), 0];
    const headers = makeHeaders({ id, expect });
    try {
      await this.js.publish(names.ready(job.priority ?? 5, token), JSON.stringify(job), { headers });
      return true;
    } catch (error) {
      if (!isRefused(error)) throw error;
    }
    const [ready] = await readLast(this.jsm, names.readyStream, [names.ready("*", token)]);
    // The attempt before is there until its ack arrives; this one itself: it was a repetition.
    return ready !== undefined && String(orderOf(parseObject(ready.data))) === String(orderOf(job));
  }
}
