import type { Network } from './network.js';
import type { TokenTree } from './vocabulary.js';

/**
 * How far a network's states are from the ends of their rules, in tokens: never fewer than are needed, and from each
 * place there is a token that leaves one less. Bytes count as one token each where no longer token is the text that
 * must come; a byte that is no token of its own cannot be counted on, which makes a distance infinite.
 */
export class Distances {
  readonly #network: Network;
  readonly #tree: TokenTree;
  readonly #known: Float64Array; // [num_states] of the states that the network begins with
  readonly #jumps: (readonly number[])[] = []; // [num_states] states behind tokens of several bytes

  constructor(network: Network, tree: TokenTree) {
    this.#network = network;
    this.#tree = tree;
    const { numStates } = network;
    this.#known = new Float64Array(numStates).fill(Infinity); // [num_states]
    for (let id = 0; id < numStates; id++) this.#jumps.push(this.#longTokens(id));
    const { start, users } = this.#usersOf(numStates);
    const open: number[] = []; // states whose distance has become known or shorter
    const measure = (id: number): void => {
      const distance = this.#measure(id);
      if (distance >= this.#known[id]!) return;
      this.#known[id] = distance;
      open.push(id);
    };
    for (let id = numStates - 1; id >= 0; id--) measure(id);
    for (let at = 0; at < open.length; at++) {
      const id = open[at]!;
      for (let user = start[id]!; user < start[id + 1]!; user++) measure(users[user]!);
    }
  }

  /** Tokens from a state to the end of its rule. */
  of(id: number): number {
    // Counted states are added as they are asked for.
    return this.#known[id] ?? this.#measure(id);
  }

  #measure(id: number): number {
    const counter = this.#network.counter(id);
    if (counter) return counter.min === 0 ? 0 : counter.min * this.of(counter.item);
    const { edges, jumps, calls, isEnd } = this.#network.state(id);
    if (isEnd) return 0;
    let least = Infinity;
    for (const edge of edges) {
      const distance = 1 + this.of(edge[2]);
      if (distance < least && this.#isWritable(edge[0], edge[1])) least = distance;
    }
    for (const target of this.#jumps[id]!) least = Math.min(least, 1 + this.of(target));
    for (const target of jumps) least = Math.min(least, this.of(target));
    for (const call of calls) least = Math.min(least, this.of(call[0]) + this.of(call[1]));
    return least;
  }

  /** For each state those whose distances are made of its own: users[start[id]] to users[start[id + 1] - 1]. */
  #usersOf(numStates: number): { start: Int32Array; users: Int32Array } {
    const start = new Int32Array(numStates + 1); // [num_states + 1]
    for (let id = 0; id < numStates; id++) this.#forReads(id, (read) => start[read + 1]!++);
    for (let id = 0; id < numStates; id++) start[id + 1]! += start[id]!;
    const users = new Int32Array(start[numStates]!); // [start[num_states]]
    const next = start.slice();
    for (let id = 0; id < numStates; id++) this.#forReads(id, (read) => (users[next[read]!++] = id));
    return { start, users };
  }

  /** Names the states whose distances a state's own is made of. */
  #forReads(id: number, name: (state: number) => void): void {
    const counter = this.#network.counter(id);
    if (counter) return name(counter.item);
    const { edges, jumps, calls } = this.#network.state(id);
    for (const [, , target] of edges) name(target);
    for (const target of this.#jumps[id]!) name(target);
    for (const target of jumps) name(target);
    for (const [start, after] of calls) {
      name(start);
      name(after);
    }
  }

  /** Whether one of these symbols is a token by itself, as control tokens are. */
  #isWritable(firstClass: number, lastClass: number): boolean {
    for (let symbolClass = firstClass; symbolClass <= lastClass; symbolClass++) {
      const bytes = this.#network.bytesOf(symbolClass);
      if (bytes.length === 0 || bytes.some((byte) => this.#tree.hasByte(byte))) return true;
    }
    return false;
  }

  /** Where tokens of several bytes lead from here, along bytes that can be no others. */
  #longTokens(id: number): readonly number[] {
    const tree = this.#tree;
    let targets: number[] | null = null;
    let node = -1;
    for (let at = id; ;) {
      const [byte, target] = this.#onlyByte(at);
      const isFirst = node < 0;
      node = byte < 0 ? -1 : isFirst ? tree.root(byte) : tree.find(byte, node + 1, tree.endOf[node]!);
      if (node < 0) break;
      if (!isFirst && tree.tokensStart[node] !== tree.tokensStart[node + 1]) (targets ??= []).push(target);
      at = target;
    }
    return targets ?? NO_STATES;
  }

  /** The one byte that goes on from a state, and where to; -1 where there are other ways. */
  #onlyByte(id: number): readonly [byte: number, target: number] {
    if (this.#network.counter(id)) return NO_BYTE;
    const { edges, jumps, calls } = this.#network.state(id);
    const [edge] = edges;
    if (edge === undefined || edges.length > 1 || jumps.length > 0 || calls.length > 0) return NO_BYTE;
    const bytes = edge[0] === edge[1] ? this.#network.bytesOf(edge[0]) : [];
    return bytes.length === 1 ? [bytes[0]!, edge[2]] : NO_BYTE;
  }
}

const NO_BYTE = [-1, -1] as const;
const NO_STATES: readonly number[] = []; // [0]
