// A worker, after docs/protocol.md: it runs the jobs of one queue.
//
// The queue must be there: Python makes it. What it leaves to Python's workers: repeatables, and
// jobs that others depend on, whose children they release.

import { hostname } from "node:os";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import type {
  ConsumerMessages, JetStreamClient, JetStreamManager, JsMsg, PubAck,
} from "@nats-io/jetstream";
import type { Msg, NatsConnection } from "@nats-io/transport-node";
import { bytesToHex, utf8ToBytes } from "@noble/hashes/utils";
import {
  idOf, isRefused, makeHeaders, Names, now, promotionId, readLast, tokenOf,
} from "./protocol.js";
import type { StoredRecord, WriteOptions } from "./protocol.js";
import { jobOf, OUTCOMES, parseClaim, parseJob, WIRE_VERSION } from "./wire.js";
import type {
  Backoff, Claim, Completed, EventBodies, Expired, Failed, FailedAttempt, Job, Json, OpenJob,
  Outcome, OutcomeState, Progress, WorkerEntry,
} from "./wire.js";

const DAY = 86_400;
const LEAD = 0.4; // seconds by which timers are early
const LONGEST_HOLD = 0.2; // seconds for which a slot is kept for a job whose time is to come
const CLAIM_AFTER = 1000; // ms
const MAX_STALLS = 3;
const HEARTBEAT = 5; // seconds
const PAUSE_ARRIVALS = 5; // seconds in which messages arrive that were sent before a pause
const UNKNOWN_TASK_TIMEOUT = 3600; // seconds
const DEFAULT_ACK_WAIT = 30e9; // nanoseconds, the server's
const MAX_ERRORS = 100;
const FULL_ERRORS = 5; // those before have no traceback and a short text
const SHORT_ERROR = 120;

/** Raised by a task: no more attempts. */
export class Fail extends Error {}

/** What a task is told of its job. */
export interface Context {
  readonly job: Readonly<OpenJob>;
  /** Aborted when the job is cancelled or its time is over. */
  readonly signal: AbortSignal;
  /** Report a share from 0 to 1, and data. */
  progress(share: number, data?: Json): Promise<void>;
}

/** A task. Its arguments have the types that it names only if producers send such. */
export type Task = (context: Context, ...args: never[]) => Promise<Json | void>;
export type Tasks = Readonly<Record<string, Task>>;

export interface WorkerOptions {
  concurrency?: number;
  prefix?: string;
}

/** One delivery of a job, and what its end has to expect. */
interface Attempt {
  readonly message: JsMsg;
  readonly token: string;
  readonly id: string;
  /** Sequence of the last record about the end of the job; 0 on a first delivery. */
  expect: number;
  /** Sequence of this attempt's claim. */
  claimed?: number;
  stalls: number;
  suspected: boolean;
  /** Whether children wait for the job. */
  edges: boolean;
  started?: number;
}

interface OpenAttempt extends Attempt {
  job: OpenJob;
}

/** What an end adds to the job. */
type EndFields<T extends Outcome> = Partial<Job> &
  Omit<T, keyof Job | "status" | "finished_at" | "worker">;

type Order = readonly [number, number];
const orderOf = (job: Job): Order => [job.reruns ?? 0, (job.retries ?? 0) + (job.put_offs ?? 0)];
const isLater = ([a, b]: Order, [c, d]: Order): boolean => a > c || (a === c && b > d);
const randomPart = (): string => crypto.randomUUID().slice(0, 6);
const sleep = (seconds: number): Promise<void> =>
  new Promise((done) => setTimeout(done, seconds * 1000));

/** Seconds before the n-th retry. */
export function backoffDelay(backoff: number | Backoff | null | undefined, n: number): number {
  if (backoff === null) return 0;
  if (backoff === undefined) return 1.5 ** n;
  if (typeof backoff === "number") return backoff ** n;
  const { kind = "exponential", delay = 1, factor = 2, maximum = null, jitter = 0 } = backoff;
  const wanted = kind === "fixed" ? delay : delay * factor ** (n - 1);
  return Math.min(wanted, maximum ?? 365 * DAY) * (1 - jitter * Math.random());
}

/** Runs the jobs of one queue: `tasks` are functions by their ids, `task(context, ...args)`. */
export class Worker {
  readonly id = `${hostname()}-${process.pid}-${randomPart()}`.replaceAll(".", "-");
  /** Resolves when the worker has stopped. */
  readonly stopped: Promise<void>;
  readonly #concurrency: number;
  readonly #since = now();
  readonly #running = new Map<string, { abort: AbortController; since: number }>(); // by id
  readonly #held = new Set<JsMsg>(); // messages on lease
  readonly #pulls: ConsumerMessages[] = [];
  readonly #timers: NodeJS.Timeout[] = [];
  #waiting: ((hasSlot: boolean) => void)[] = [];
  #free: number;
  #stopping = false;
  #pausedUntil = 0;
  #tellStopped: () => void = () => {};
  #secret = new Uint8Array();

  private constructor(
    private readonly nc: NatsConnection,
    private readonly js: JetStreamClient,
    private readonly jsm: JetStreamManager,
    private readonly names: Names,
    private readonly tasks: Tasks,
    /** Milliseconds. */
    private readonly lease: number,
    concurrency: number,
  ) {
    this.#concurrency = this.#free = concurrency;
    this.stopped = new Promise((resolve) => (this.#tellStopped = resolve));
  }

  /** Start a worker; it takes jobs when this resolves. */
  static async start(
    nc: NatsConnection,
    queue: string,
    tasks: Tasks,
    { concurrency = 10, prefix = "amq" }: WorkerOptions = {},
  ): Promise<Worker> {
    const names = new Names(queue, prefix);
    const jsm = await jetstreamManager(nc);
    const tiers: string[] = [];
    let ackWait = Infinity;
    for await (const { name, config } of jsm.consumers.list(names.readyStream)) {
      if (!/^tier_-?\d+$/.test(name)) continue;
      tiers.push(name);
      ackWait = Math.min(ackWait, config.ack_wait ?? DEFAULT_ACK_WAIT);
    }
    if (!tiers.length) throw new Error(`there is no queue ${queue}: start a worker in Python once`);
    const worker = new Worker(nc, jetstream(nc), jsm, names, tasks, ackWait / 1e6, concurrency);
    await worker.#begin(tiers);
    return worker;
  }

  /** Stop in order: running jobs finish, the others are handed back. */
  async stop(): Promise<void> {
    if (this.#stopping) return this.stopped;
    this.#stopping = true;
    await Promise.all(this.#pulls.map((pull) => pull.close()));
    this.#handBack();
    while (this.#free < this.#concurrency) await sleep(0.01); // until the last end is written
    this.#timers.forEach(clearInterval);
    this.#tellStopped();
  }

  async #begin(tiers: string[]): Promise<void> {
    const { names } = this;
    this.#every(this.lease / 3, async () => this.#held.forEach((message) => message.working()));
    this.#hear("cancel", (id) => this.#running.get(id)?.abort.abort(new Error("cancelled")));
    this.#hear("stop", (worker, inbox) => this.#onStop(worker, inbox));
    this.#hear("pause", (until, inbox) => this.#onPause(Number(until), inbox));
    this.#hear("resume", () => (this.#pausedUntil = 0));
    for (const tier of tiers) await this.#pull(names.readyStream, tier, (m) => this.#take(m));
    this.#secret = await this.#readSecret();
    await this.#pull(names.bucketStream, "promoter", (message) => this.#promote(message));
    await this.#heartbeat();
    this.#every(HEARTBEAT * 1000, () => this.#heartbeat());
  }

  /** Call `act` with the text of each such signal, and the subject for answers if it has one. */
  #hear(what: string, act: (text: string, inbox: string) => void): void {
    const callback = (_: Error | null, message: Msg): void => {
      const text = message.string();
      const at = text.lastIndexOf(` ${this.names.control("answer.")}`);
      if (at < 0) act(text, "");
      else act(text.slice(0, at), text.slice(at + 1));
    };
    this.nc.subscribe(this.names.control(what), { callback });
  }

  #answer(inbox: string): void {
    if (inbox) this.nc.publish(inbox, this.id);
  }

  #onStop(worker: string, inbox: string): void {
    if (worker !== tokenOf(this.id)) return;
    this.stop().catch(console.error);
    this.#answer(inbox);
  }

  /** The server sends nothing more: give back what is here already, and what is on its way. */
  #onPause(until: number, inbox: string): void {
    if (Number.isNaN(until)) return;
    this.#pausedUntil = Math.min(until, now() + PAUSE_ARRIVALS);
    this.#handBack();
    this.#answer(inbox);
  }

  #handBack(): void {
    for (const give of this.#waiting.splice(0)) give(false);
  }

  #every(milliseconds: number, act: () => Promise<unknown>): void {
    this.#timers.push(setInterval(() => act().catch(console.error), milliseconds));
  }

  async #pull(stream: string, name: string, act: (message: JsMsg) => Promise<void>): Promise<void> {
    const consumer = await this.js.consumers.get(stream, name);
    const messages = await consumer.consume({ max_messages: this.#concurrency });
    this.#pulls.push(messages);
    const read = async (): Promise<void> => {
      for await (const message of messages) {
        this.#held.add(message);
        act(message)
          .catch((error) => console.error(`${message.subject}: ${error}`)) // comes again
          .finally(() => this.#held.delete(message));
      }
    };
    read().catch(console.error);
  }

  async #readSecret(): Promise<Uint8Array<ArrayBuffer>> {
    const key = this.names.key("queue.secret");
    const [record] = await readLast(this.jsm, this.names.bucketStream, [key]);
    if (record !== undefined) return new Uint8Array(record.data.slice(0, 64));
    const secret = utf8ToBytes(bytesToHex(crypto.getRandomValues(new Uint8Array(32))));
    try {
      await this.#write("queue.secret", secret, { expect: { filter: key, sequence: 0 } });
    } catch (error) {
      if (!isRefused(error)) throw error;
    }
    return this.#readSecret();
  }

  #heartbeat(): Promise<PubAck> {
    const entry: WorkerEntry = {
      id: this.id,
      queue: this.names.queue,
      concurrency: this.#concurrency,
      host: hostname(),
      pid: process.pid,
      since: this.#since,
      running: [...this.#running.keys()].slice(0, 100),
      starts: [...this.#running.values()].slice(0, 100).map(({ since }) => since),
      repeatables: [],
      version: `node ${process.versions.node}`,
      busy: this.#running.size,
      memory: process.memoryUsage.rss(),
      stopping: this.#stopping,
      rate_limit: null,
    };
    const options = { headers: makeHeaders({ ttl: 3 * HEARTBEAT, rollup: true }) };
    const key = `${this.names.workers}.${tokenOf(this.id)}`;
    return this.js.publish(key, JSON.stringify(entry), options);
  }

  #write(key: string, body: object | Uint8Array, options: WriteOptions): Promise<PubAck> {
    const data = body instanceof Uint8Array ? body : JSON.stringify(body);
    return this.js.publish(this.names.key(key), data, { headers: makeHeaders(options) });
  }

  #read(...keys: string[]): Promise<StoredRecord[]> {
    return readLast(this.jsm, this.names.bucketStream, keys.map(this.names.key));
  }

  #findOutcome(token: string, records: StoredRecord[]): StoredRecord | undefined {
    const keys = OUTCOMES.map((state) => this.names.key(`done.${token}.${state}`));
    return records.find((record) => keys.includes(record.subject));
  }

  #delete(sequence: number): Promise<unknown> {
    return this.jsm.streams.deleteMessage(this.names.bucketStream, sequence, false).catch(() => {});
  }

  #tell<What extends keyof EventBodies>(what: What, token: string, body: EventBodies[What]): void {
    this.nc.publish(this.names.event(what, token), JSON.stringify(body));
  }

  async #slot(): Promise<boolean> {
    if (this.#stopping || this.#pausedUntil > now()) return false;
    if (this.#free > 0) {
      this.#free--;
      return true;
    }
    return new Promise((give) => this.#waiting.push(give));
  }

  #freeSlot(): void {
    const next = this.#waiting.shift();
    if (next === undefined) this.#free++;
    else next(true);
  }

  // -- one delivery

  async #take(message: JsMsg): Promise<void> {
    if (!(await this.#slot())) return message.nak(this.#stopping ? 0 : 500);
    try {
      const attempt = await this.#open(message);
      if (attempt !== undefined) await this.#run(attempt);
    } finally {
      this.#freeSlot();
    }
  }

  /** Read the job, and on a redelivery what is stored of it; undefined: there is nothing to run. */
  async #open(message: JsMsg): Promise<OpenAttempt | undefined> {
    const [, , , priority, token = ""] = message.subject.split(".");
    const id = idOf(token);
    const attempt: Attempt = {
      message, token, id, expect: 0, stalls: 0, suspected: false, edges: false,
    };
    const parsed = parseJob(message.data);
    const job = "job" in parsed ? parsed.job : undefined;
    if (message.info.deliveryCount > 1 && !(await this.#claim(attempt, job))) return undefined;
    if ("fault" in parsed) {
      await this.#reject(attempt, parsed.fault);
      return undefined;
    }
    const created_at = parsed.job.created_at ?? message.info.timestampNanos / 1e9;
    return { ...attempt, job: { ...parsed.job, id, priority: Number(priority), created_at } };
  }

  /** Decide whether this redelivery may run, and say so in a claim. */
  async #claim(attempt: Attempt, job: Job | undefined): Promise<boolean> {
    const { message, token } = attempt;
    const { streamSequence, deliveryCount } = message.info;
    const { key } = this.names;
    const records = await this.#read(`later.${token}.>`, `done.${token}.>`);
    const there = records.filter((record) => !record.removed);
    const edge = key(`done.${token}.awaited.`);
    attempt.edges = there.some((record) => record.subject.startsWith(edge));
    if (this.#findOutcome(token, there) !== undefined) {
      this.#acknowledge(attempt, job); // only the ack was lost
      return false;
    }
    const later = there.find((record) => record.subject.startsWith(key(`later.${token}.`)));
    const next = later && jobOf(later.data);
    if (next !== undefined && job !== undefined && isLater(orderOf(next), orderOf(job))) {
      message.ack(); // the next attempt is under way
      return false;
    }
    const record = there.find((each) => each.subject === key(`done.${token}.claim`));
    const claim = record && parseClaim(record.data);
    if (claim?.message === streamSequence) {
      if (claim.delivery >= deliveryCount) return false; // another worker has it: no ack
      const isUnclaimed = deliveryCount - claim.delivery > 1; // a delivery came between
      attempt.stalls = claim.stalls + (claim.released ? 0 : 1);
      attempt.suspected = (claim.suspected ?? false) || (claim.released && isUnclaimed);
    } else {
      // A lease cannot have run out before the message is as old as a lease: it was given back.
      attempt.suspected = Date.now() - message.info.timestampNanos / 1e6 >= this.lease;
    }
    const ends = records.filter((each) => each.subject.startsWith(key("done.")));
    attempt.expect = Math.max(0, ...ends.map((each) => each.sequence));
    try {
      await this.#writeClaim(attempt);
    } catch (error) {
      if (!isRefused(error)) throw error;
      message.nak(50); // another writer was first: look again
      return false;
    }
    return true;
  }

  async #writeClaim(attempt: Attempt): Promise<void> {
    const { streamSequence, deliveryCount } = attempt.message.info;
    const claim: Claim = {
      worker: this.id,
      message: streamSequence,
      delivery: deliveryCount,
      stalls: attempt.stalls,
      released: false,
      ...(attempt.suspected ? { suspected: true } : {}),
    };
    const expect = { filter: this.names.key(`done.${attempt.token}.>`), sequence: attempt.expect };
    const key = `done.${attempt.token}.claim`;
    const { seq } = await this.#write(key, claim, { expect, ttl: DAY, rollup: true });
    attempt.expect = attempt.claimed = seq;
  }

  async #run(attempt: OpenAttempt): Promise<void> {
    const { job } = attempt;
    // One of many that are due at once is made ready a little early.
    const early = (job.delay_until ?? 0) - now();
    if (early > 0 && early <= LONGEST_HOLD) {
      await sleep(early);
      if (this.#stopping || this.#pausedUntil > now()) return attempt.message.nak();
    }
    const at = now();
    const losses = attempt.stalls + (attempt.suspected ? 1 : 0);
    if (losses >= MAX_STALLS) {
      attempt.stalls = losses;
      return this.#fail(attempt, { error: `its worker was lost ${losses} times`, traceback: "" });
    }
    if ((job.v ?? WIRE_VERSION) > WIRE_VERSION) {
      return this.#putOff(attempt, `a job of version ${job.v} of the format`);
    }
    if (job.ttl != null && at - job.created_at > job.ttl) {
      const last_error = `its time to live of ${job.ttl} s was over`;
      return this.#end<Expired>(attempt, "expired", { last_error });
    }
    if (job.delay_until != null && job.delay_until > at) { // far away, by a foreign producer
      return this.#reschedule(attempt, {}, job.delay_until);
    }
    const task = Object.hasOwn(this.tasks, job.task) ? this.tasks[job.task] : undefined;
    if (task === undefined) return this.#putOff(attempt, `no task ${job.task} here`);
    attempt.started = at;
    this.#tell("started", attempt.token, { ...job, active_since: at, worker: this.id });
    let result: Json;
    // A claim says that it ran, should this worker be lost.
    let claiming: Promise<void> | undefined;
    const timer = setTimeout(() => {
      if (attempt.claimed === undefined) claiming = this.#writeClaim(attempt).catch(() => {});
    }, CLAIM_AFTER);
    try {
      result = await this.#call(task, attempt);
    } catch (error) {
      clearTimeout(timer);
      await claiming;
      return this.#failed(attempt, error);
    }
    clearTimeout(timer);
    await claiming;
    await this.#end<Completed>(attempt, "completed", { result });
  }

  /** Call the task; throws what it throws, and when it is cancelled or runs too long. */
  async #call(task: Task, attempt: OpenAttempt): Promise<Json> {
    const { job, id } = attempt;
    const abort = new AbortController();
    const context: Context = {
      job,
      signal: abort.signal,
      progress: (share, data = null) => this.#report(attempt, share, data),
    };
    const aborted = new Promise<never>((_, reject) =>
      abort.signal.addEventListener("abort", () => reject(abort.signal.reason), { once: true }),
    );
    let limit: NodeJS.Timeout | undefined;
    if (job.timeout != null) {
      const reason = new Error(`it ran longer than ${job.timeout} s`);
      limit = setTimeout(() => abort.abort(reason), job.timeout * 1000);
    }
    this.#running.set(id, { abort, since: now() });
    try {
      const call = task as (context: Context, ...args: Json[]) => Promise<Json | void>;
      return (await Promise.race([call(context, ...(job.args ?? [])), aborted])) ?? null;
    } finally {
      clearTimeout(limit);
      this.#running.delete(id);
    }
  }

  async #report({ id, token }: Attempt, progress: number, data: Json): Promise<void> {
    const report: Progress = { id, progress, data };
    this.#tell("progress", token, report);
    await this.#write(`progress.${token}`, report, { ttl: DAY, rollup: true });
  }

  // -- how an attempt ends

  async #failed(attempt: OpenAttempt, error: unknown): Promise<void> {
    const { job } = attempt;
    const attempts = (job.retries ?? 0) + 1;
    const failure = {
      type: error instanceof Error ? error.name : "Error",
      error: error instanceof Error ? `${error.name}: ${error.message}` : `Error: ${error}`,
      traceback: (error instanceof Error && error.stack) || "",
    };
    if (error instanceof Fail || attempts > (job.max_retries ?? 3)) {
      return this.#fail(attempt, failure);
    }
    const delay = backoffDelay(job.backoff, attempts);
    const fields = this.#noted(attempt, failure);
    await this.#reschedule(attempt, fields, delay > 0 ? now() + delay : null);
  }

  #noted({ job }: OpenAttempt, failure: Omit<FailedAttempt, "attempt" | "at">): Partial<Job> {
    const retries = (job.retries ?? 0) + 1;
    const errors = [...(job.errors ?? []), { attempt: retries, ...failure, at: now() }];
    const shorten = (each: FailedAttempt, index: number, { length }: FailedAttempt[]) =>
      index >= length - FULL_ERRORS
        ? each
        : { ...each, error: String(each.error).slice(0, SHORT_ERROR), traceback: "" };
    return { retries, errors: errors.slice(-MAX_ERRORS).map(shorten) };
  }

  #fail(attempt: OpenAttempt, failure: Omit<FailedAttempt, "attempt" | "at">): Promise<void> {
    return this.#end<Failed>(attempt, "failed", {
      ...this.#noted(attempt, failure),
      last_error: failure.error,
      error_traceback: failure.traceback,
    });
  }

  /** Record a message that is no job as failed, with its text. */
  #reject(attempt: Attempt, fault: string): Promise<void> {
    const { id, message } = attempt;
    const created_at = message.info.timestampNanos / 1e9;
    const job: OpenJob = { v: 1, id, task: "?", created_at, priority: 5 };
    const body = message.string().slice(0, 100_000);
    return this.#end<Failed>({ ...attempt, job }, "failed", { last_error: fault, body });
  }

  async #putOff(attempt: OpenAttempt, reason: string): Promise<void> {
    const { job } = attempt;
    const at = now();
    const since = Math.min(job.put_off_since ?? at, at);
    if (at - since >= UNKNOWN_TASK_TIMEOUT) {
      const isNewer = (job.v ?? WIRE_VERSION) > WIRE_VERSION;
      return isNewer
        ? this.#reject(attempt, reason)
        : this.#fail(attempt, { error: reason, traceback: "" });
    }
    const put_offs = (job.put_offs ?? 0) + 1;
    const fields = { put_offs, put_off_since: since, put_off_reason: reason };
    await this.#reschedule(attempt, fields, at + Math.min(60, Math.max(1, at - since)));
  }

  /** Write the outcome. */
  async #end<T extends Outcome>(
    attempt: OpenAttempt,
    status: T["status"] & OutcomeState,
    fields: EndFields<T>,
  ): Promise<void> {
    const { job, token } = attempt;
    const outcome = {
      ...job,
      ...(attempt.stalls ? { stalls: attempt.stalls } : {}),
      status,
      ...fields,
      active_since: attempt.started ?? null,
      finished_at: now(),
      worker: this.id,
    };
    const ttl = status === "completed" ? DAY : 30 * DAY;
    if (status !== "completed") {
      await this.#write(`index.${status}.${token}.entry`, new Uint8Array(), { ttl, rollup: true });
    }
    await this.#finish(attempt, `done.${token}.${status}`, outcome, { ttl });
  }

  /** Have the job run again, at a time or, if there is none, at once. */
  async #reschedule(
    attempt: OpenAttempt,
    fields: Partial<Job>,
    runAt: number | null,
  ): Promise<void> {
    const { token } = attempt;
    const { put_off_since, put_off_reason, snoozes, ...rest } = attempt.job; // it was run since
    const next: Job = { ...rest, ...fields, delay_until: runAt };
    const released = `later.${token}.released`;
    if (runAt === null || runAt - LEAD <= now()) return this.#finish(attempt, released, next, {});
    const timer = { at: runAt - LEAD, target: this.names.key(released) };
    await this.#finish(attempt, `later.${token}.delayed`, next, { timer, rollup: true });
  }

  /** Write the end. It is refused after another outcome, or if a child has begun to wait for it. */
  async #finish(
    attempt: OpenAttempt,
    key: string,
    body: Job,
    options: WriteOptions,
  ): Promise<void> {
    const { message, token, job } = attempt;
    const done = `done.${token}.`;
    const filter = this.names.key(`${done}>`);
    for (;;) {
      try {
        await this.#write(key, body, { ...options, expect: { filter, sequence: attempt.expect } });
        break;
      } catch (error) {
        if (!isRefused(error)) throw error;
      }
      const records = await this.#read(`${done}>`);
      const there = new Map(
        records
          .filter((record) => !record.removed)
          .map((record) => [record.subject.slice(this.names.key(done).length), record.data]),
      );
      attempt.edges = [...there.keys()].some((word) => word.startsWith("awaited."));
      if (OUTCOMES.some((state) => there.has(state))) break; // the first outcome wins
      const stored = there.get("claim");
      const claim = stored && parseClaim(stored);
      const { streamSequence, deliveryCount } = message.info;
      const mine: Order = [streamSequence, deliveryCount];
      if (claim !== undefined && isLater([claim.message, claim.delivery], mine)) return;
      attempt.expect = Math.max(0, ...records.map((record) => record.sequence));
    }
    if (attempt.claimed !== undefined) await this.#delete(attempt.claimed);
    if (key.startsWith("done.")) this.#acknowledge(attempt, job);
    else message.ack();
  }

  /** Acknowledge a job that has ended; Python's workers tell those that wait for it. */
  #acknowledge({ edges, message }: Attempt, job: Job | undefined): void {
    if (edges || job?.children?.length) this.#leave(message);
    else message.ack();
  }

  /** Give a message back, for a worker of the library. */
  #leave(message: JsMsg): void {
    message.nak(Math.min(100 * message.info.deliveryCount, 5000));
  }

  // -- released jobs become ready

  async #promote(message: JsMsg): Promise<void> {
    const [, , kind, token = "", place] = message.subject.split(".");
    if (message.headers?.has("KV-Operation")) return message.ack();
    const job = kind === "later" && place === "released" ? jobOf(message.data) : undefined;
    if (job === undefined || job.parents?.length || job.wide) return this.#leave(message);
    const { key } = this.names;
    const wait = (job.delay_until ?? 0) - now();
    if (wait > 0) await sleep(wait);
    const sequence = message.info.streamSequence;
    const records = await this.#read(`later.${token}.>`, `done.${token}.>`);
    const there = records.filter((record) => !record.removed);
    const outcome = this.#findOutcome(token, there);
    const ended = outcome && jobOf(outcome.data);
    if (ended !== undefined && (ended.reruns ?? 0) < (job.reruns ?? 0)) {
      return message.nak(100); // a retry by hand that is unfinished
    }
    const isCurrent = there.some((record) => record.sequence === sequence);
    const delayed = there.find((each) => each.subject === key(`later.${token}.delayed`));
    const next = delayed && jobOf(delayed.data);
    const isSuperseded = next !== undefined && isLater(orderOf(next), orderOf(job));
    if (outcome === undefined && isCurrent && !isSuperseded) {
      const { delay_until, ...body } = job;
      if (!(await this.#makeReady(token, body, message))) return message.nak(50);
    }
    await this.#delete(sequence);
    message.ack();
  }

  async #makeReady(token: string, job: Job, message: JsMsg): Promise<boolean> {
    const { names } = this;
    const { streamSequence, timestampNanos } = message.info;
    const id = promotionId(this.#secret, streamSequence, timestampNanos);
    const filter = names.ready("*", token);
    const subject = names.ready(job.priority ?? 5, token);
    const headers = makeHeaders({ id, expect: { filter, sequence: 0 } });
    try {
      await this.js.publish(subject, JSON.stringify(job), { headers });
      return true;
    } catch (error) {
      if (!isRefused(error)) throw error;
    }
    const [record] = await readLast(this.jsm, names.readyStream, [filter]);
    const ready = record && jobOf(record.data);
    // The attempt before is there until its ack arrives; this one itself: it was a repetition.
    return ready !== undefined && String(orderOf(ready)) === String(orderOf(job));
  }
}
