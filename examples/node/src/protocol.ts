// What both sides need of docs/protocol.md: tokens, subjects, headers, and reads.

import { JetStreamApiCodes, JetStreamApiError } from "@nats-io/jetstream";
import type { JetStreamManager } from "@nats-io/jetstream";
import { connect, headers } from "@nats-io/transport-node";
import type { MsgHdrs, NatsConnection } from "@nats-io/transport-node";
import { blake2b } from "@noble/hashes/blake2";
import { bytesToHex, utf8ToBytes } from "@noble/hashes/utils";

const RESERVED = /[.*>%\s\x00-\x1f\x7f]/gu;

/** An id as one token of a subject. */
export const tokenOf = (id: string): string =>
  id.replace(RESERVED, (character) =>
    [...new TextEncoder().encode(character)]
      .map((byte) => "%" + byte.toString(16).toUpperCase().padStart(2, "0"))
      .join(""),
  );

/** The id that a token stands for. */
export const idOf = (token: string): string => decodeURIComponent(token);

/** The names of one queue. */
export class Names {
  readonly readyStream: string;
  readonly bucketStream: string;
  readonly workers: string;

  constructor(readonly queue: string, readonly prefix = "amq") {
    this.readyStream = `${prefix}_${queue}`;
    this.bucketStream = `KV_${prefix}_${queue}_scheduler`;
    this.workers = `$KV.${prefix}_workers`;
  }

  ready = (priority: number | "*", token: string): string =>
    `${this.prefix}.${this.queue}.ready.${priority}.${token}`;
  event = (what: string, token: string): string =>
    `${this.prefix}.${this.queue}.event.${what}.${token}`;
  control = (what: string): string => `${this.prefix}.${this.queue}.control.${what}`;
  key = (key: string): string => `$KV.${this.prefix}_${this.queue}_scheduler.${key}`;
}

/** Connect to NATS_URL, in which a token or a name and a password may be. */
export function connectAsTold(): Promise<NatsConnection> {
  const url = new URL(process.env.NATS_URL ?? "nats://127.0.0.1:4222");
  const user = decodeURIComponent(url.username);
  const pass = decodeURIComponent(url.password);
  const login = !user ? {} : pass ? { user, pass } : { token: user };
  return connect({ servers: url.host, ...login });
}

export interface WriteOptions {
  /** Makes it safe to write again. */
  id?: string;
  /** The last sequence at a subject, or at those of a filter. */
  expect?: { filter: string; sequence: number };
  /** Seconds. */
  ttl?: number;
  /** Replace what is there. */
  rollup?: boolean;
  /** Publish it to `target` at a time. */
  timer?: { at: number; target: string };
}

/** The headers of a write. */
export function makeHeaders({ id, expect, ttl, rollup, timer }: WriteOptions): MsgHdrs {
  const made = headers();
  if (id !== undefined) made.set("Nats-Msg-Id", id);
  if (expect !== undefined) {
    made.set("Nats-Expected-Last-Subject-Sequence", String(expect.sequence));
    made.set("Nats-Expected-Last-Subject-Sequence-Subject", expect.filter);
  }
  if (ttl !== undefined) made.set("Nats-TTL", `${Math.max(1, Math.round(ttl))}s`);
  if (rollup) made.set("Nats-Rollup", "sub");
  if (timer !== undefined) {
    made.set("Nats-Schedule", `@at ${new Date(timer.at * 1000).toISOString()}`);
    made.set("Nats-Schedule-Target", timer.target);
  }
  return made;
}

/** Whether the server refused a write: something else is there than was expected. */
export const isRefused = (error: unknown): boolean =>
  error instanceof JetStreamApiError && error.code === JetStreamApiCodes.StreamWrongLastSequence;

/** Unix seconds. */
export const now = (): number => Date.now() / 1000;

export interface StoredRecord {
  subject: string;
  sequence: number;
  /** It is a marker: what was there was removed. */
  removed: boolean;
  data: Uint8Array;
}

/** The last records of these subjects or filters, markers too. */
export async function readLast(
  jsm: JetStreamManager,
  stream: string,
  filters: string[],
): Promise<StoredRecord[]> {
  const found: StoredRecord[] = [];
  try {
    const records = await jsm.direct.getLastMessagesFor(stream, { multi_last: filters });
    for await (const record of records) {
      found.push({
        subject: record.subject,
        sequence: record.seq,
        removed: record.header?.has("KV-Operation") ?? false,
        data: record.data,
      });
    }
  } catch (error) {
    if (!isNotFound(error)) throw error;
  }
  return found;
}

function isNotFound(error: unknown): boolean {
  const { code, status } = error as { code?: unknown; status?: unknown };
  return code === 404 || status === 404;
}

/** The message id under which all promoters make a released record ready: the server stores one. */
export function promotionId(secret: Uint8Array, sequence: number, timestampNanos: number): string {
  const at = timestampNanos / 1e9;
  const parts = ["released", String(sequence), Number.isInteger(at) ? `${at}.0` : String(at)];
  return bytesToHex(blake2b(utf8ToBytes(parts.join("\0")), { key: secret, dkLen: 16 }));
}
