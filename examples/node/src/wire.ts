// What the messages hold, field by field, as docs/protocol.md has it. Times are Unix seconds,
// durations seconds.

export type Json = null | boolean | number | string | Json[] | { [name: string]: Json };

export const WIRE_VERSION = 1;

/** A job. Fields that are not here are kept and passed on. */
export interface Job {
  /** Version of the format: 1. */
  v?: number;
  id?: string;
  task: string;
  args?: Json[];
  kwargs?: { [name: string]: Json };
  created_at?: number | null;
  /** Attempts that may follow the first: 3. */
  max_retries?: number;
  /** A number `b` waits `b ** n` before the n-th retry: 1.5. */
  backoff?: number | Backoff | null;
  ttl?: number | null;
  timeout?: number | null;
  priority?: number;
  delay_until?: number | null;
  custom_id?: boolean;
  /** Attempts that have failed. */
  retries?: number;
  errors?: FailedAttempt[];
  stalls?: number;
  reruns?: number;
  put_offs?: number;
  snoozes?: number;
  put_off_since?: number | null;
  put_off_reason?: string | null;
  repeat_every?: number | string | null;
  depends_on?: string[] | null;
  parents?: string[];
  children?: string[];
  wide?: string;
  wide_children?: { [id: string]: string };
  parent_results?: { [id: string]: Json };
  on_parent_failure?: "wait" | "fail" | "run";
  meta?: { [name: string]: string };
  deduplication?: { [name: string]: Json } | null;
}

/** A job in the hands of a worker: its id and priority are those of the subject. */
export type OpenJob = Job & { id: string; priority: number; created_at: number };

export interface Backoff {
  kind?: "exponential" | "fixed";
  delay?: number;
  factor?: number;
  maximum?: number | null;
  jitter?: number;
}

export interface FailedAttempt {
  attempt: number;
  /** The class of the exception, if it was one. */
  type?: string;
  error: string;
  traceback: string;
  at: number;
}

/** The outcome of a job. */
export type Outcome = Completed | Failed | Expired | Cancelled;

interface Ended extends Job {
  finished_at: number;
  active_since?: number | null;
  worker?: string;
}

export interface Completed extends Ended {
  status: "completed";
  result: Json;
}

export interface Failed extends Ended {
  status: "failed";
  last_error: string;
  error_traceback?: string;
  /** Without its arguments, which were too large. */
  truncated?: boolean;
  /** Of a message that was no job: its text. */
  body?: string;
}

export interface Expired extends Ended {
  status: "expired";
  last_error: string;
}

export interface Cancelled extends Ended {
  status: "cancelled";
  last_error?: string;
}

export type OutcomeState = Outcome["status"];

export const OUTCOMES: readonly string[] = [
  "completed", "failed", "expired", "cancelled",
] satisfies OutcomeState[];

/** A worker runs this delivery of a ready message, or has handed it back. */
export interface Claim {
  worker: string;
  message: number;
  delivery: number;
  stalls: number;
  released: boolean;
  suspected?: boolean;
}

export interface Progress {
  id: string;
  /** A share from 0 to 1. */
  progress: number;
  data: Json;
}

export interface WorkerEntry {
  id: string;
  queue: string;
  concurrency: number;
  host: string;
  pid: number;
  since: number;
  running: string[];
  /** When each of `running` started. */
  starts: number[];
  repeatables: string[];
  version: string;
  busy: number;
  /** Bytes. */
  memory: number;
  stopping: boolean;
  /** Starts, and in how many seconds; `null`: no limit. */
  rate_limit: [number, number] | null;
}

/** The bodies of events, by the word in their subjects. */
export interface EventBodies {
  waiting: Job;
  delayed: Job;
  parked: Job;
  released: Job;
  completed: Completed;
  failed: Failed;
  expired: Expired;
  cancelled: Cancelled;
  claim: Claim;
  started: Job & { active_since: number; worker: string };
  worker: { worker: string };
  progress: Progress;
  stalled: { id: string; job_id: string; stalls: number };
  ready: { id: string; job_id: string };
  duplicated: { id: string; job_id: string };
  debounced: { id: string; job_id: string; debounce_id: string };
  deduplicated: {
    id: string;
    job_id: string;
    deduplication_id: string;
    deduplicated_job_id: string;
  };
}

/** An event; `what` tells the type of its body. */
export type Event = {
  [What in keyof EventBodies]: { what: What; body: EventBodies[What] };
}[keyof EventBodies];

// -- what comes from others is checked before it is believed

type Check = (value: unknown) => boolean;

const isText: Check = (value) => typeof value === "string";
const isFlag: Check = (value) => typeof value === "boolean";
const isNumber = (value: unknown): value is number => Number.isFinite(value);
const isInteger: Check = (value) => Number.isInteger(value);
const isCount: Check = (value) => isNumber(value) && Number.isInteger(value) && value >= 0;
const isDuration: Check = (value) => isNumber(value) && value >= 0;
const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);
const isList: Check = (value) => Array.isArray(value);
const listOf = (check: Check): Check => (value) => Array.isArray(value) && value.every(check);
const mapOf = (check: Check): Check => (value) =>
  isObject(value) && Object.values(value).every(check);
const orNull = (check: Check): Check => (value) => value === null || check(value);
const oneOf = (...words: string[]): Check => (value) => words.includes(value as string);

type Checks<T> = { [Field in keyof Required<T>]: Check };

const BACKOFF: Checks<Backoff> = {
  kind: oneOf("exponential", "fixed"),
  delay: isDuration,
  factor: (value) => isNumber(value) && value >= 1,
  maximum: orNull(isDuration),
  jitter: (value) => isNumber(value) && value >= 0 && value <= 1,
};

const JOB: Checks<Job> = {
  v: isInteger,
  id: (value) => typeof value === "string" && value !== "",
  task: (value) => typeof value === "string" && value !== "",
  args: isList,
  kwargs: isObject,
  created_at: orNull(isNumber),
  max_retries: isCount,
  backoff: orNull((value) =>
    isObject(value) ? findFault(value, BACKOFF) === undefined : isDuration(value),
  ),
  ttl: orNull(isDuration),
  timeout: orNull((value) => isNumber(value) && value > 0),
  priority: isInteger,
  delay_until: orNull(isNumber),
  custom_id: isFlag,
  retries: isCount,
  errors: listOf(isObject),
  stalls: isInteger,
  reruns: isCount,
  put_offs: isCount,
  snoozes: isCount,
  put_off_since: orNull(isNumber),
  put_off_reason: orNull(isText),
  repeat_every: orNull((value) => isNumber(value) || isText(value)),
  depends_on: orNull(listOf(isText)),
  parents: listOf(isText),
  children: listOf(isText),
  wide: isText,
  wide_children: mapOf(isText),
  parent_results: isObject,
  on_parent_failure: oneOf("wait", "fail", "run"),
  meta: mapOf(isText),
  deduplication: orNull(isObject),
};

/** What is needed to put off a job of a later version, whose other fields may be of other kinds. */
const OF_ANY_VERSION: Partial<Checks<Job>> = {
  v: JOB.v,
  task: JOB.task,
  priority: JOB.priority,
  delay_until: JOB.delay_until,
  retries: JOB.retries,
  errors: JOB.errors,
  children: JOB.children,
  reruns: JOB.reruns,
  put_offs: JOB.put_offs,
  put_off_since: JOB.put_off_since,
};

const CLAIM: Checks<Claim> = {
  worker: isText,
  message: isInteger,
  delivery: isInteger,
  stalls: isInteger,
  released: isFlag,
  suspected: isFlag,
};

/** The first field that is of another kind than it should be. */
function findFault(
  value: Record<string, unknown>,
  checks: Record<string, Check>,
): string | undefined {
  return Object.keys(checks).find((field) => field in value && !checks[field]?.(value[field]));
}

/** What an end has written into a job, which a job of another program may not bring along. */
const OF_ENDS = [
  "status", "result", "last_error", "error_traceback",
  "active_since", "finished_at", "worker", "stalls",
];
const OF_THE_LIBRARY = '{"v":1,"id":"';

/** The JSON object in a message; undefined if there is none. */
function parseObject(data: Uint8Array): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
    return isObject(value) ? value : undefined;
  } catch {
    return undefined;
  }
}

/** The job in a message, or what is wrong with it. */
export function parseJob(data: Uint8Array): { job: Job } | { fault: string } {
  const value = parseObject(data);
  if (value === undefined) return { fault: "it is not a JSON object" };
  if (value.task === undefined) return { fault: "it has no task" };
  const isNewer = isNumber(value.v) && value.v > WIRE_VERSION;
  const fault = findFault(value, isNewer ? OF_ANY_VERSION : JOB);
  if (fault !== undefined) return { fault: `${fault}: not what the protocol says` };
  const start = new TextDecoder().decode(data.subarray(0, OF_THE_LIBRARY.length));
  if (start !== OF_THE_LIBRARY) for (const field of OF_ENDS) delete value[field];
  return { job: value as unknown as Job };
}

/** The job in a record of the bucket, if it is one. */
export function jobOf(data: Uint8Array): Job | undefined {
  const parsed = parseJob(data);
  return "job" in parsed ? parsed.job : undefined;
}

/** The claim in a record; a malformed one claims nothing. */
export function parseClaim(data: Uint8Array): Claim | undefined {
  const value = parseObject(data);
  if (value === undefined || findFault(value, CLAIM) !== undefined) return undefined;
  const isComplete = ["message", "delivery", "stalls"].every((field) => field in value);
  return isComplete ? (value as unknown as Claim) : undefined;
}

const EVENTS: { [What in keyof EventBodies]: true } = {
  waiting: true, delayed: true, parked: true, released: true, completed: true, failed: true,
  expired: true, cancelled: true, claim: true, started: true, worker: true, progress: true,
  stalled: true, ready: true, duplicated: true, debounced: true, deduplicated: true,
};

/** The event in a message; undefined if a later version of the format sent it. */
export function parseEvent(what: string, data: Uint8Array): Event | undefined {
  const body = parseObject(data);
  if (body === undefined || !Object.hasOwn(EVENTS, what)) return undefined;
  return { what, body } as unknown as Event;
}
