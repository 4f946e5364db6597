// What both sides need of docs/protocol.md: tokens, subjects, headers, and reads.

import { connect, headers } from "@nats-io/transport-node";

export const WRONG_LAST_SEQUENCE = 10071;

const RESERVED = /[.*>%\s\x00-\x1f\x7f]/gu;

/** An id as one token of a subject. */
export const tokenOf = (id) =>
  id.replace(RESERVED, (character) =>
    [...new TextEncoder().encode(character)]
      .map((byte) => "%" + byte.toString(16).toUpperCase().padStart(2, "0"))
      .join(""),
  );

/** The id that a token stands for. */
export const idOf = (token) => decodeURIComponent(token);

/** The names of one queue. */
export class Names {
  constructor(queue, prefix = "amq") {
    this.queue = queue;
    this.prefix = prefix;
    this.readyStream = `${prefix}_${queue}`;
    this.bucketStream = `KV_${prefix}_${queue}_scheduler`;
    this.workers = `$KV.${prefix}_workers`;
  }
  ready = (priority, token) => `${this.prefix}.${this.queue}.ready.${priority}.${token}`;
  event = (what, token) => `${this.prefix}.${this.queue}.event.${what}.${token}`;
  control = (what) => `${this.prefix}.${this.queue}.control.${what}`;
  key = (key) => `$KV.${this.prefix}_${this.queue}_scheduler.${key}`;
}

/** Connect to NATS_URL, in which a token or a name and a password may be. */
export function connectAsTold() {
  const url = new URL(process.env.NATS_URL ?? "nats://127.0.0.1:4222");
  const user = decodeURIComponent(url.username);
  const login = !user ? {} : url.password ? { user, pass: decodeURIComponent(url.password) } : { token: user };
  return connect({ servers: url.host, ...login });
}

/** Headers of a write. `expect`: [subject or filter, last sequence there]. `ttl`: seconds. */
export function makeHeaders({ id, expect, ttl, rollup, timer } = {}) {
  const made = headers();
  if (id !== undefined) made.set("Nats-Msg-Id", id);
  if (expect !== undefined) {
    made.set("Nats-Expected-Last-Subject-Sequence", String(expect[1]));
    made.set("Nats-Expected-Last-Subject-Sequence-Subject", expect[0]);
  }
  if (ttl !== undefined) made.set("Nats-TTL", `${Math.max(1, Math.round(ttl))}s`);
  if (rollup) made.set("Nats-Rollup", "sub");
  if (timer !== undefined) {
    made.set("Nats-Schedule", `@at ${new Date(timer.at * 1000).toISOString()}`);
    made.set("Nats-Schedule-Target", timer.target);
  }
  return made;
}

/** Unix seconds. */
export const now = () => Date.now() / 1000;

/** The last records of these subjects or filters, by key, without the ones that say "removed". */
export async function readLast(jsm, stream, filters) {
  const found = [];
  try {
    for await (const record of await jsm.direct.getLastMessagesFor(stream, { multi_last: filters })) {
      found.push({
        subject: record.subject,
        sequence: record.seq,
        removed: record.header?.has("KV-Operation") ?? false,
        data: record.data,
      });
    }
  } catch (error) {
    if (error.status !== 404 && error.code !== 404) throw error;
  }
  return found;
}

/** The JSON object in a record or a message; undefined if there is none. */
export function parseObject(data) {
  try {
    const value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
    return value !== null && typeof value === "object" && !Array.isArray(value) ? value : undefined;
  } catch {
    return undefined;
  }
}
