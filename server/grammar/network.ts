import type { Grammar, GrammarNode } from './grammar.js';
import { utf8Ranges } from './utf8.js';

/** first and last symbol class, both included, and the state behind */
export type Edge = readonly [first: number, last: number, target: number];
/** the state where a rule begins, and where it goes on after the rule has ended */
export type Call = readonly [start: number, after: number];

export interface NetworkState {
  edges: Edge[];
  jumps: number[]; // states reached without a symbol
  calls: Call[];
  /** the rule may end here */
  isEnd: boolean;
}

interface Counter {
  item: number;
  min: number;
  max: number | null;
}

/** Symbols are bytes, then control tokens from here. */
export const FIRST_CONTROL = 256;

export const MAX_STATES = 200_000;

/**
 * A grammar as a recursive transition network: each rule has a start and one end, and calls others. Counted
 * repetitions become states when they are first asked for. Symbols that no edge tells apart share a class.
 */
export class Network {
  readonly start: number;
  readonly numClasses: number;
  readonly #states: NetworkState[] = []; // [num_states]
  readonly #classOf: Uint16Array; // [256 + num_controls]
  readonly #controls = new Map<number, number>(); // token id -> symbol
  readonly #bytesOf: number[][]; // [num_classes] empty for a control token
  readonly #counters = new Map<number, Counter>(); // state -> what it counts
  readonly #unfilled = new Set<number>(); // counting states whose call is not there yet
  readonly #counterStates = new Map<string, number>();
  readonly #ruleStarts: number[]; // [num_rules]

  /** Throws where the grammar is too large or a rule begins with itself. */
  constructor(grammar: Grammar) {
    const { rules } = grammar;
    this.#ruleStarts = rules.map(() => this.#newState());
    for (const [index, node] of rules.entries()) this.#addRule(this.#ruleStarts[index]!, node);
    this.start = this.#ruleStarts[0]!;
    const cuts = new Set<number>([0]);
    for (const { edges } of this.#states) {
      for (const [first, last] of edges) cuts.add(first).add(last + 1);
    }
    this.#classOf = new Uint16Array(FIRST_CONTROL + this.#controls.size);
    let classId = -1;
    for (let symbol = 0; symbol < this.#classOf.length; symbol++) {
      if (cuts.has(symbol) || symbol === FIRST_CONTROL) classId++;
      this.#classOf[symbol] = classId;
    }
    this.numClasses = classId + 1;
    this.#bytesOf = Array.from({ length: this.numClasses }, () => []); // [num_classes]
    for (let byte = 0; byte < FIRST_CONTROL; byte++) this.#bytesOf[this.#classOf[byte]!]!.push(byte);
    for (const state of this.#states) {
      state.edges = state.edges.map(([first, last, to]) => [this.#classOf[first]!, this.#classOf[last]!, to]);
    }
    this.#refuseLeftRecursion();
  }

  /** class of a byte */
  classOf(byte: number): number {
    return this.#classOf[byte]!;
  }

  get numStates(): number {
    return this.#states.length;
  }

  /** bytes of a class; none where it is a control token's */
  bytesOf(symbolClass: number): readonly number[] {
    return this.#bytesOf[symbolClass]!;
  }

  /** what a state counts; undefined where it is no counting one */
  counter(id: number): Readonly<Counter> | undefined {
    return this.#counters.size === 0 ? undefined : this.#counters.get(id);
  }

  /** control tokens that the grammar names, with their classes */
  get controls(): [tokenId: number, symbolClass: number][] {
    return Array.from(this.#controls, ([tokenId, symbol]) => [tokenId, this.#classOf[symbol]!]);
  }

  state(id: number): NetworkState {
    const state = this.#states[id]!;
    if (this.#unfilled.delete(id)) {
      const { item, min, max } = this.#counters.get(id)!;
      const after = this.#counterState(item, Math.max(0, min - 1), max === null ? null : max - 1);
      if (max !== 0) state.calls.push([item, after]);
    }
    return state;
  }

  /** Whether a call that returns to this state can be forgotten: the caller ends with it. */
  isPlainEnd(id: number): boolean {
    const { edges, jumps, calls, isEnd } = this.state(id);
    return isEnd && edges.length === 0 && jumps.length === 0 && calls.length === 0;
  }

  #newState(isEnd = false): number {
    if (this.#states.length >= MAX_STATES) throw new RangeError('the grammar is too large');
    return this.#states.push({ edges: [], jumps: [], calls: [], isEnd }) - 1;
  }

  #addRule(start: number, node: GrammarNode): void {
    this.#add(node, start, this.#newState(true));
  }

  /** Adds paths that match `node` from one state to another. */
  #add(node: GrammarNode, from: number, to: number): void {
    switch (node.kind) {
      case 'text':
        return this.#addBytes(
          Array.from(Buffer.from(node.text), (byte): [number, number] => [byte, byte]),
          from,
          to,
        );
      case 'class':
        for (const range of node.ranges) for (const bytes of utf8Ranges(range)) this.#addBytes(bytes, from, to);
        return;
      case 'control': {
        let symbol = this.#controls.get(node.tokenId);
        if (symbol === undefined) this.#controls.set(node.tokenId, (symbol = FIRST_CONTROL + this.#controls.size));
        return this.#addBytes([[symbol, symbol]], from, to);
      }
      case 'choice':
        for (const item of node.items) this.#add(item, from, to);
        return;
      case 'rule':
        this.#states[from]!.calls.push([this.#ruleStarts[node.index]!, to]);
        return;
      case 'sequence': {
        if (node.items.length === 0) this.#states[from]!.jumps.push(to);
        node.items.forEach((item, index) => {
          const next = index === node.items.length - 1 ? to : this.#newState();
          this.#add(item, from, next);
          from = next;
        });
        return;
      }
      case 'repeat':
        return this.#addRepeat(node, from, to);
    }
  }

  #addBytes(ranges: readonly (readonly [number, number])[], from: number, to: number): void {
    if (ranges.length === 0) this.#states[from]!.jumps.push(to);
    ranges.forEach(([first, last], index) => {
      const next = index === ranges.length - 1 ? to : this.#newState();
      this.#states[from]!.edges.push([first, last, next]);
      from = next;
    });
  }

  #addRepeat({ item, min, max }: Extract<GrammarNode, { kind: 'repeat' }>, from: number, to: number): void {
    if (max === null && min <= 1) {
      const loop = this.#newState();
      if (min === 1) this.#add(item, from, loop);
      else this.#states[from]!.jumps.push(loop);
      this.#add(item, loop, loop);
      this.#states[loop]!.jumps.push(to);
    } else if (min === 0 && max === 1) {
      this.#add(item, from, to);
      this.#states[from]!.jumps.push(to);
    } else if (max !== null && max < min) {
      return;
    } else {
      const start = this.#newState();
      this.#addRule(start, item);
      this.#states[from]!.calls.push([this.#counterState(start, min, max), to]);
    }
  }

  #counterState(item: number, min: number, max: number | null): number {
    const key = `${item}:${min}:${max}`;
    const known = this.#counterStates.get(key);
    if (known !== undefined) return known;
    const id = this.#newState(min === 0);
    this.#counterStates.set(key, id);
    this.#counters.set(id, { item, min, max });
    this.#unfilled.add(id);
    return id;
  }

  /** A rule that can call itself before any symbol would be called for ever. */
  #refuseLeftRecursion(): void {
    const nullable = this.#nullableStarts();
    const status = new Map<number, 'open' | 'done'>();
    const visit = (start: number): void => {
      status.set(start, 'open');
      for (const called of this.#leftCalls(start, nullable)) {
        if (status.get(called) === 'open') throw new RangeError('a rule of the grammar begins with itself');
        if (!status.has(called)) visit(called);
      }
      status.set(start, 'done');
    };
    for (const start of this.#ruleStarts) if (!status.has(start)) visit(start);
  }

  /** Starts of rules that may be empty. */
  #nullableStarts(): Set<number> {
    const nullable = new Set<number>();
    const starts = new Set<number>([...this.#ruleStarts, ...this.#counters.keys()]);
    for (const { item } of this.#counters.values()) starts.add(item);
    for (let before = -1; before !== nullable.size;) {
      before = nullable.size;
      for (const start of starts) if (this.#reachesEnd(start, nullable)) nullable.add(start);
    }
    return nullable;
  }

  #reachesEnd(start: number, nullable: ReadonlySet<number>): boolean {
    const counter = this.#counters.get(start);
    if (counter) return counter.min === 0 || nullable.has(counter.item);
    return this.#withoutSymbols(start, nullable).some((id) => this.#states[id]!.isEnd);
  }

  #leftCalls(start: number, nullable: ReadonlySet<number>): number[] {
    return this.#withoutSymbols(start, nullable).flatMap((id) => {
      const counter = this.#counters.get(id);
      return counter ? [counter.item] : this.#states[id]!.calls.map(([called]) => called);
    });
  }

  /** States of one rule that are reached before any symbol. */
  #withoutSymbols(start: number, nullable: ReadonlySet<number>): number[] {
    const found = new Set([start]);
    for (const id of found) {
      const { jumps, calls } = this.#states[id]!;
      for (const jump of jumps) found.add(jump);
      for (const [called, after] of calls) if (nullable.has(called)) found.add(after);
    }
    return [...found];
  }
}
