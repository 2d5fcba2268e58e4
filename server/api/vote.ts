import type { FastifyReply, FastifyRequest } from 'fastify';
import { ApiError } from '../errors.js';
import { asJson, finalAnswer } from '../text/final-answer.js';
import { ChatBodies, headOf, withSeed } from './chat-body.js';
import type { ChatBody, ChatJob } from './chat-request.js';
import type { Choice, Choices } from './choices.js';
import type { ApiContext } from './context.js';
import type { components } from './openapi.js';
import { sendWhole } from './whole.js';

type Schemas = components['schemas'];

/** so many times the tokens of the longest chain that has ended */
const LATE_FACTOR = 2;

/** Votes of chains for their answers. Of answers with as many votes, the one whose first chain has the lowest index wins. */
export class Vote {
  readonly #numChains: number;
  /** null: a chain that ended without an answer */
  readonly #answers = new Map<number, string | null>(); // chain -> answer

  constructor(numChains: number) {
    this.#numChains = numChains;
  }

  add(chain: number, answer: string | null): void {
    this.#answers.set(chain, answer);
  }

  get numEnded(): number {
    return this.#answers.size;
  }

  /** Answers with their chains in order, the winner first. */
  get counts(): { answer: string; chains: number[] }[] {
    const chains = new Map<string, number[]>();
    for (const [chain, answer] of [...this.#answers].sort(([a], [b]) => a - b)) {
      if (answer !== null) chains.set(answer, [...(chains.get(answer) ?? []), chain]);
    }
    const counts = [...chains].map(([answer, own]) => ({ answer, chains: own }));
    return counts.sort((a, b) => b.chains.length - a.chains.length || a.chains[0]! - b.chains[0]!);
  }

  /** Whether the chains that run cannot change who wins, not even by drawing level. */
  get isDecided(): boolean {
    const [first, second] = this.counts;
    const lead = (first?.chains.length ?? 0) - (second?.chains.length ?? 0);
    return lead > this.#numChains - this.numEnded;
  }

  /** The fewest chains that must have begun so that the vote may be decided when those but `numLate` have ended. */
  numToBegin(numLate: number): number {
    const [first, second] = this.counts;
    const lead = (first?.chains.length ?? 0) - (second?.chains.length ?? 0);
    const numOpen = this.#numChains - this.numEnded;
    // lead + more > numOpen - more
    return this.numEnded + numLate + Math.max(0, Math.floor((numOpen - lead) / 2) + 1);
  }
}

/** Throws ApiError where there is nothing to vote on, or nobody to tell. */
export function checkVote({ n, stream }: ChatBody, { engineRequest, numChoices }: ChatJob): void {
  if (stream) {
    throw new ApiError('unsupported_value', "A vote is over when its chains are; leave out 'stream'.", 'vote');
  }
  if (numChoices < 2) {
    const message = `'vote' needs chains that vote: set 'n' to 2 or more${n ? `; it is ${n}` : ''}.`;
    throw new ApiError('invalid_value', message, 'n');
  }
  if (engineRequest.sampling.temperature === 0) {
    const message = "At temperature 0 all chains are the same; set 'temperature' to vote.";
    throw new ApiError('invalid_value', message, 'temperature');
  }
}

/**
 * Answers with the winning one of several chains. No more are begun than can decide the vote, and those that can change
 * nothing any more are stopped: where chains agree, that is little more than half of them.
 */
export function sendVote(
  context: ApiContext,
  job: ChatJob,
  choices: Choices,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<unknown> {
  const vote = new Vote(choices.all.length);
  const ended = new Map<number, Schemas['ChatCompletionChoice']>();
  let longest = Infinity; // tokens of the longest chain that has ended
  choices.onProgress = ({ index, job: own, completion }: Choice) => {
    const { output } = completion!;
    if (output.finishReason !== null) {
      const choice = new ChatBodies(own, context, 0).choice(output, output.take());
      longest = Math.max(longest === Infinity ? 0 : longest, output.numTokens);
      ended.set(index, choice);
      vote.add(index, answerOf(choice));
    } else if (output.numTokens <= LATE_FACTOR * longest) return;
    const numLate = choices.all.filter((chain) => isLate(chain, longest)).length;
    choices.numToBegin = Math.max(choices.numToBegin, vote.numToBegin(numLate));
    if (vote.isDecided) choices.stop();
  };
  choices.numToBegin = vote.numToBegin(0);
  const body = (): string => {
    const counts = vote.counts;
    const [first] = counts;
    const chain = first?.chains[0] ?? Math.min(...ended.keys());
    const whole: Omit<Schemas['ChatCompletion'], 'seed'> = {
      ...headOf(job, context, 'chat.completion'),
      choices: [ended.get(chain)!],
      usage: choices.usage,
      vote: {
        answer: first?.answer ?? null,
        share: (first?.chains.length ?? 0) / vote.numEnded,
        chain,
        num_chains: choices.all.length,
        num_stopped: choices.all.length - vote.numEnded,
        counts: counts.map(({ answer, chains }) => ({ answer, count: chains.length })),
      },
      ...(job.returnMetrics ? { metrics: choices.metrics } : {}),
      ...(job.returnTokenIds ? { prompt_token_ids: job.engineRequest.promptIds } : {}),
    };
    return withSeed(JSON.stringify(whole), job);
  };
  return sendWhole(context, choices, body, request, reply);
}

/** Another chain takes the place of one that thinks so much longer than those that have ended. */
function isLate({ completion }: Choice, longest: number): boolean {
  const output = completion?.output;
  return output?.finishReason === null && output.numTokens > LATE_FACTOR * longest;
}

/** What a chain votes for; null where it has no answer, or was cut off before its end. */
function answerOf({ message, finish_reason: finishReason }: Schemas['ChatCompletionChoice']): string | null {
  if (finishReason === 'length') return null;
  if (!message.tool_calls?.length) return finalAnswer(message.content ?? '');
  const calls = message.tool_calls.map(({ function: { name, arguments: args } }) => `${name} ${asJson(args) ?? args}`);
  return calls.join('\n');
}
