import type { ThinkingControl } from '../engine/request.js';
import type { ChatOutput, Usage } from './chat-output.js';
import type { ChatJob } from './chat-request.js';
import { Completion, type RequestOrigin } from './completion.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';

type CompletionMetrics = components['schemas']['CompletionMetrics'];

/** One of a response's choices; its completion is null until its prompt's first choice has had its first event. */
export interface Choice {
  readonly index: number;
  readonly job: ChatJob;
  completion: Completion | null;
}

/**
 * The choices of one request, in groups of one prompt each. The first of a group leads: the others are submitted at
 * its first event, when the prefix cache holds the prompt. One failure ends them all.
 */
export class Choices {
  readonly all: readonly Choice[];
  readonly #groups: readonly (readonly Choice[])[];
  readonly #submit: (job: ChatJob, earlier?: Completion) => Completion;
  readonly #keep: (choice: Choice) => void;
  /** times that all were aborted: a run of before must not go on when they are resumed */
  #numAborts = 0;
  #isAborted = false;
  /** choices with a lower index may begin; raised in onProgress alone */
  numToBegin = Infinity;
  /** told after each event of a choice, its last one included */
  onProgress: (choice: Choice) => void = () => {};

  /** Submits the first of each group. Throws ApiError where the engine does not take one. */
  constructor(groups: readonly (readonly ChatJob[])[], context: ApiContext, origin: RequestOrigin, startedAt: number) {
    this.#submit = (job, earlier) => new Completion(job, context, origin, startedAt, earlier);
    const first = groups[0]![0]!;
    const responseId = first.isPlain ? first.id : first.engineRequest.requestId;
    this.#keep = ({ index, job, completion }) => {
      const { ids: tokenIds, marks: controls } = completion!;
      const { asked, engineRequest } = job;
      // Generated again it is no answer that a client goes on from.
      const again = { ...job, asked: null };
      context.finished.add(responseId, index, { job: again, tenant: origin.tenant, tokenIds, controls });
      if (asked === null) return;
      context.answers.add(asked.key, engineRequest, tokenIds, completion!.output.callIds, context.prompts);
      const isWhole = completion!.output.callIds.length === 0 && this.all.length === 1;
      if (isWhole) context.prewarm.begin(asked, engineRequest, tokenIds, origin.log);
    };
    let index = 0;
    this.#groups = groups.map((jobs) => jobs.map((job) => ({ index: index++, job, completion: null })));
    this.all = this.#groups.flat();
    try {
      for (const [leader] of this.#groups) leader!.completion = this.#submit(leader!.job);
    } catch (error) {
      this.abort();
      throw error;
    }
  }

  get isAborted(): boolean {
    return this.#isAborted;
  }

  /** The client is gone, or one choice has failed. */
  abort(): void {
    this.#isAborted = true;
    this.#numAborts++;
    for (const { completion } of this.all) completion?.abort();
  }

  /** Ends those that still run, with what they have. */
  stop(): void {
    for (const { completion } of this.all) completion?.abort();
  }

  /** After abort(): those that had not ended are submitted again and go on behind their tokens. Throws ApiError. */
  resume(): void {
    this.#isAborted = false;
    try {
      for (const choice of this.all) {
        const { completion, job } = choice;
        if (completion !== null && completion.output.finishReason === null) {
          choice.completion = this.#submit(job, completion);
        }
      }
    } catch (error) {
      this.abort();
      throw error;
    }
  }

  /** Steers the reasoning of all choices, or of one; returns the indices of those in which reasoning goes on. */
  control(control: ThinkingControl, index?: number): number[] {
    const asked = index === undefined ? this.all : this.all.filter((choice) => choice.index === index);
    return asked.filter(({ completion }) => completion?.control(control)).map((choice) => choice.index);
  }

  /** Ids of the engine's requests that have been submitted. */
  requestIds(): string[] {
    return this.all.flatMap(({ completion }) => completion?.requestId ?? []);
  }

  /** Runs all to their ends, or to the next abort(); `onEvent` is told after each event, its choice's last one included. Throws ApiError. */
  async run(onEvent: (choice: Choice, output: ChatOutput) => void): Promise<void> {
    try {
      await Promise.all(this.#groups.map((group) => this.#runGroup(group, onEvent)));
    } catch (error) {
      this.abort();
      throw error;
    }
  }

  /** Prompts count once each, however many choices share one. */
  get usage(): Usage {
    let [promptTokens, cachedTokens, completionTokens, reasoningTokens] = [0, 0, 0, 0];
    for (const group of this.#groups) {
      promptTokens += group[0]!.job.engineRequest.promptIds.length;
      cachedTokens += group[0]!.completion?.output.cachedTokens ?? 0;
      for (const { completion } of group) {
        completionTokens += completion?.output.numTokens ?? 0;
        reasoningTokens += completion?.output.numReasoning ?? 0;
      }
    }
    return {
      prompt_tokens: promptTokens,
      completion_tokens: completionTokens,
      total_tokens: promptTokens + completionTokens,
      prompt_tokens_details: { cached_tokens: cachedTokens },
      completion_tokens_details: { reasoning_tokens: reasoningTokens },
      prompt_cache_hit_tokens: cachedTokens,
      prompt_cache_miss_tokens: promptTokens - cachedTokens,
    };
  }

  /** Drafts of all choices; null where nothing speculates. */
  get metrics(): CompletionMetrics {
    const parts = this.all.flatMap(({ completion }) => completion?.output.metrics.speculative ?? []);
    if (parts.length === 0) return { speculative: null };
    const sum = (field: 'draft_tokens' | 'accepted_tokens') => parts.reduce((total, part) => total + part[field], 0);
    return { speculative: { draft_tokens: sum('draft_tokens'), accepted_tokens: sum('accepted_tokens') } };
  }

  async #runGroup(group: readonly Choice[], onEvent: (choice: Choice, output: ChatOutput) => void): Promise<void> {
    const [leader, ...others] = group as [Choice, ...Choice[]];
    const numAborts = this.#numAborts;
    const advance = async (choice: Choice): Promise<boolean> => {
      const completion = choice.completion!;
      const goesOn = await completion.advance();
      if (numAborts !== this.#numAborts) return false;
      if (goesOn || completion.output.finishReason !== null) {
        if (!goesOn) this.#keep(choice);
        onEvent(choice, completion.output);
        this.onProgress(choice);
      }
      return goesOn;
    };
    const hasBegun = leader.completion!.tokenIds.length > 0;
    const leaderGoesOn = hasBegun || (await advance(leader));
    if (numAborts !== this.#numAborts) return;
    const begun = new Set<Choice>();
    const beginMore = (): Promise<void>[] => {
      const more = others.filter((choice) => choice.index < this.numToBegin && !begun.has(choice));
      for (const choice of more) {
        begun.add(choice);
        choice.completion ??= this.#submit(choice.job);
      }
      return more.map((choice) => {
        const end = finish(choice, true);
        end.catch(() => this.abort()); // who has begun it may still be long in coming to see that
        return end;
      });
    };
    const finish = async (choice: Choice, goesOn: boolean): Promise<void> => {
      const ends: Promise<void>[] = []; // [num_begun_here]
      while (goesOn) {
        goesOn = await advance(choice);
        if (numAborts === this.#numAborts) ends.push(...beginMore());
      }
      await Promise.all(ends);
    };
    await Promise.all([...beginMore(), finish(leader, leaderGoesOn)]);
  }
}
