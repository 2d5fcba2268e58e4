import { BYTE_OF_CHARACTER } from '../text/byte-level.js';

/** What a tokenizer's file says of its tokens: an id's bytes, and which ids are added tokens, never made of text. */
export interface TokenTable {
  bytes: (Uint8Array | undefined)[]; // [vocab_size] undefined: no text
  controls: Set<number>;
}

interface TokenizerFile {
  added_tokens?: { id: number }[];
  model: { vocab: Record<string, number> };
}

/** Tokens of a byte-level tokenizer.json, for a model of so many logits. */
export function readTokenTable(file: TokenizerFile, vocabSize: number): TokenTable {
  const bytes = new Array<Uint8Array | undefined>(vocabSize).fill(undefined); // [vocab_size]
  for (const [content, id] of Object.entries(file.model.vocab)) {
    const values = Array.from(content, (character) => BYTE_OF_CHARACTER.get(character));
    if (id < vocabSize && values.length > 0 && !values.includes(undefined))
      bytes[id] = Uint8Array.from(values as number[]);
  }
  const controls = new Set<number>();
  for (const { id } of file.added_tokens ?? []) {
    if (id >= vocabSize) continue;
    controls.add(id);
    bytes[id] = undefined;
  }
  return { bytes, controls };
}

/** All tokens by their bytes, as a tree laid out in preorder: a node's subtree follows it. */
export class TokenTree {
  readonly vocabSize: number;
  readonly table: TokenTable;
  readonly byteOf: Uint8Array; // [num_nodes]
  readonly depthOf: Uint16Array; // [num_nodes] from 1
  readonly endOf: Int32Array; // [num_nodes] first node behind the subtree
  readonly tokensStart: Int32Array; // [num_nodes + 1]
  readonly tokenIds: Int32Array; // [tokensStart[num_nodes]]
  readonly maxDepth: number;
  readonly #rootOf: Int32Array; // [256] node of a first byte; -1 where there is none

  constructor(table: TokenTable) {
    this.table = table;
    this.vocabSize = table.bytes.length;
    const sorted = table.bytes
      .flatMap((bytes, id) =>
        bytes && bytes.length <= 0xffff ? [{ id, key: Buffer.from(bytes).toString('latin1') }] : [],
      )
      .sort((a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : a.id - b.id));
    const byteOf: number[] = [];
    const depthOf: number[] = [];
    const endOf: number[] = [];
    const tokensStart: number[] = [];
    const tokenIds: number[] = [];
    const path: number[] = []; // nodes from the root to the last one
    let previous = '';
    for (const { id, key } of sorted) {
      let shared = 0;
      while (shared < previous.length && shared < key.length && previous[shared] === key[shared]) shared++;
      for (const node of path.splice(shared)) endOf[node] = byteOf.length;
      for (let depth = shared; depth < key.length; depth++) {
        path.push(byteOf.length);
        byteOf.push(key.charCodeAt(depth));
        depthOf.push(depth + 1);
        tokensStart.push(tokenIds.length);
      }
      tokenIds.push(id);
      previous = key;
    }
    for (const node of path) endOf[node] = byteOf.length;
    tokensStart.push(tokenIds.length);
    this.byteOf = Uint8Array.from(byteOf); // [num_nodes]
    this.depthOf = Uint16Array.from(depthOf); // [num_nodes]
    this.endOf = Int32Array.from(endOf); // [num_nodes]
    this.tokensStart = Int32Array.from(tokensStart); // [num_nodes + 1]
    this.tokenIds = Int32Array.from(tokenIds); // [tokensStart[num_nodes]]
    this.maxDepth = depthOf.reduce((most, depth) => Math.max(most, depth), 0);
    this.#rootOf = Int32Array.from({ length: 256 }, (_, byte) => this.find(byte, 0, byteOf.length)); // [256]
  }

  /** Whether a byte is a token by itself. */
  hasByte(byte: number): boolean {
    const node = this.root(byte);
    return node >= 0 && this.tokensStart[node] !== this.tokensStart[node + 1];
  }

  /** The node of tokens that begin with a byte; -1 where there are none. */
  root(byte: number): number {
    return this.#rootOf[byte]!;
  }

  /** Of sibling nodes, which lie from one node to another, the one with this byte; -1 where there is none. */
  find(byte: number, from: number, to: number): number {
    for (let node = from; node < to; node = this.endOf[node]!) if (this.byteOf[node] === byte) return node;
    return -1;
  }

  get numNodes(): number {
    return this.byteOf.length;
  }
}
