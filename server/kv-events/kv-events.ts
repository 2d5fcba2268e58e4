import type { BlockStored, CacheEvent } from '../engine/cache-events.js';
import { encodeMsgpack, Float, type MsgpackValue } from './msgpack.js';
import { Publisher } from './publisher.js';

export interface KvEventsOptions {
  host: string;
  port: number;
  /** names this server and its model to routers: kv@SERVER@MODEL */
  topic: string;
  blockSize: number;
  log?: (line: string) => void;
}

/**
 * What the prefix cache holds, published in the form that llm-d and Dynamo read from vLLM: messages of topic, sequence
 * number (8 bytes, big-endian) and payload; the payload is [time, events, rank], each event a list that begins with its
 * name. Hashes are the last 64 bits of ours.
 */
export class KvEvents {
  readonly #publisher: Publisher;
  readonly #topic: Buffer;
  readonly #blockSize: number;
  #sequence = 0n;

  private constructor(publisher: Publisher, { topic, blockSize }: KvEventsOptions) {
    this.#publisher = publisher;
    this.#topic = Buffer.from(topic, 'utf8');
    this.#blockSize = blockSize;
  }

  /** Rejects where the address cannot be listened on. */
  static async listen(options: KvEventsOptions): Promise<KvEvents> {
    return new KvEvents(await Publisher.listen(options.host, options.port, options.log), options);
  }

  get port(): number {
    return this.#publisher.port;
  }

  get numSubscribers(): number {
    return this.#publisher.numSubscribers;
  }

  publish(events: readonly CacheEvent[], seconds = Date.now() / 1000): void {
    const sequence = Buffer.alloc(8);
    sequence.writeBigUInt64BE(this.#sequence++);
    const batch = [new Float(seconds), chains(events).map((chain) => this.#encode(chain)), 0];
    this.#publisher.publish([this.#topic, sequence, encodeMsgpack(batch)]);
  }

  async close(): Promise<void> {
    await this.#publisher.close();
  }

  #encode(chain: readonly CacheEvent[]): MsgpackValue {
    const [first] = chain as [CacheEvent];
    const none = null; // lora id, medium, lora name
    switch (first.kind) {
      case 'cleared':
        return ['AllBlocksCleared'];
      case 'removed':
        return ['BlockRemoved', [shortHash(first.hash)], none];
      case 'stored': {
        const blocks = chain as readonly BlockStored[];
        const parent = first.parentHash === null ? null : shortHash(first.parentHash);
        const tokenIds = blocks.flatMap(({ tokenIds: ids }) => [...ids]); // [num_blocks * block_size]
        const hashes = blocks.map(({ hash }) => shortHash(hash)); // [num_blocks]
        return ['BlockStored', hashes, parent, tokenIds, this.#blockSize, none, none, none];
      }
    }
  }
}

/** Blocks stored one behind the other in one chain belong into one event; everything else stands alone. */
function chains(events: readonly CacheEvent[]): CacheEvent[][] {
  const all: CacheEvent[][] = [];
  for (const event of events) {
    const last = all.at(-1)?.at(-1);
    if (event.kind === 'stored' && last?.kind === 'stored' && event.parentHash === last.hash) all.at(-1)!.push(event);
    else all.push([event]);
  }
  return all;
}

function shortHash(hash: string): bigint {
  return BigInt(`0x${hash.slice(-16)}`);
}
