import type { RequestProgress } from './request.js';
import type { Sequence } from './sequence.js';

/**
 * The open sequences, waiting or running. Both queues are in order of priority and arrival: the last running sequence is
 * preempted first, and the first waiting one is admitted first.
 */
export class SequenceQueues {
  readonly #open = new Map<string, Sequence>();
  readonly #waiting: Sequence[] = []; // [num_waiting]
  readonly #running: Sequence[] = []; // [num_running]
  #numPrewarms = 0;

  get size(): number {
    return this.#open.size;
  }

  /** Of the open sequences those that somebody asked for: parts of prompts that nobody has take no request's place. */
  get numRequests(): number {
    return this.#open.size - this.#numPrewarms;
  }

  get waiting(): readonly Sequence[] {
    return this.#waiting;
  }

  get running(): readonly Sequence[] {
    return this.#running;
  }

  get(requestId: string): Sequence | undefined {
    return this.#open.get(requestId);
  }

  ids(): string[] {
    return [...this.#open.keys()];
  }

  /** Queues a new sequence. */
  add(sequence: Sequence): void {
    this.#open.set(sequence.id, sequence);
    if (sequence.isPrewarm) this.#numPrewarms++;
    insert(this.#waiting, sequence);
  }

  /** Lets the first waiting sequence run. */
  admitFirst(): Sequence {
    const sequence = this.#waiting.shift()!;
    sequence.status = 'running';
    insert(this.#running, sequence);
    return sequence;
  }

  /** Sends the last running sequence back to wait. */
  preemptLast(): Sequence {
    const sequence = this.#running.pop()!;
    sequence.status = 'waiting';
    insert(this.#waiting, sequence);
    return sequence;
  }

  /** Takes a sequence out for good. */
  remove(sequence: Sequence): void {
    const queue = sequence.status === 'running' ? this.#running : this.#waiting;
    queue.splice(queue.indexOf(sequence), 1);
    this.#open.delete(sequence.id);
    if (sequence.isPrewarm) this.#numPrewarms--;
    sequence.status = 'finished';
  }

  /** Where the sequences stand that have had no event yet. */
  progress(): [requestId: string, progress: RequestProgress][] {
    const waiting = this.#waiting.map((sequence, numAhead): [string, RequestProgress] => [
      sequence.id,
      { status: 'waiting', numAhead },
    ]);
    const prefills = this.#running
      .filter(({ numCompletion, numPending }) => numCompletion === 0 && numPending > 0)
      .map(({ id, numComputed, promptLength }): [string, RequestProgress] => [
        id,
        { status: 'prefill', numComputed, numTokens: promptLength },
      ]);
    return [...waiting, ...prefills];
  }

  checkOrder(): void {
    for (const queue of [this.#running, this.#waiting]) {
      if (queue.some((sequence, index) => index > 0 && !queue[index - 1]!.precedes(sequence))) {
        throw new Error(`order of sequences broken: ${queue.map(({ id }) => id).join(', ')}`);
      }
    }
  }
}

/** Keeps a queue in order; most sequences belong to its end. */
function insert(queue: Sequence[], sequence: Sequence): void {
  let index = queue.length;
  while (index > 0 && sequence.precedes(queue[index - 1]!)) index--;
  queue.splice(index, 0, sequence);
}
