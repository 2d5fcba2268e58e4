import type { FastifyReply, FastifyRequest } from 'fastify';
import { headOf, withSeed } from './chat-body.js';
import type { ChatOutput, Piece, Usage } from './chat-output.js';
import { jobOfChoice } from './chat-request.js';
import { Choices } from './choices.js';
import { ChunkDialect, type ChunkBodies } from './chunk-dialect.js';
import { checkReady } from './client.js';
import type { ApiContext } from './context.js';
import type { TokenLogprob } from './logprobs.js';
import type { components } from './openapi.js';
import { ChoiceStream } from './stream.js';
import { readTextRequest, type TextBody, type TextJob } from './text-request.js';
import { sendWhole } from './whole.js';

type Schemas = components['schemas'];
type Job = TextJob;

/** The handler of POST /v1/completions: prompts as they are, without template or phases. */
export async function createCompletion(
  context: ApiContext,
  request: FastifyRequest<{ Body: TextBody }>,
  reply: FastifyReply,
): Promise<unknown> {
  const startedAt = performance.now();
  checkReady(context);
  const jobs = readTextRequest(request.body, request.tenant, context);
  const groups = jobs.map((job) =>
    Array.from({ length: job.numChoices }, (_, index): Job => ({ ...jobOfChoice(job, index), echo: job.echo })),
  );
  const choices = new Choices(groups, context, request, startedAt);
  const bodies = groups.flat().map((job, index) => new TextBodies(job, context, index));
  if (jobs[0]!.isStream) {
    const stream = new ChoiceStream(context, choices, new ChunkDialect(choices, bodies, jobs[0]!));
    return stream.begin(request, reply);
  }
  const bodyOf = (): string => {
    const body = {
      ...headOf(jobs[0]!, context, 'text_completion'),
      choices: choices.all.map(({ index, completion }) => bodies[index]!.choice(completion!.output)),
      usage: choices.usage,
    };
    return withSeed(JSON.stringify(body), jobs[0]!);
  };
  return sendWhole(context, choices, bodyOf, request, reply);
}

/** Bodies of one choice; text offsets count from the choice's own beginning. */
class TextBodies implements ChunkBodies {
  readonly #job: Job;
  readonly #context: ApiContext;
  readonly #index: number;
  #isFirst = true;
  #offset = 0;

  constructor(job: Job, context: ApiContext, index: number) {
    this.#job = job;
    this.#context = context;
    this.#index = index;
  }

  choice(output: ChatOutput): Schemas['CompletionChoice'] {
    return this.#choice(output.take(), output);
  }

  piece(piece: Piece, usage: Usage | null | undefined): string {
    return this.#chunk([piece], null, usage);
  }

  finish(output: ChatOutput, rest: readonly Piece[], usage: Usage | null | undefined): string {
    return this.#chunk(rest, output, usage);
  }

  usage(usage: Usage): string {
    return JSON.stringify({ ...headOf(this.#job, this.#context, 'text_completion'), choices: [], usage });
  }

  #chunk(pieces: readonly Piece[], ended: ChatOutput | null, usage: Usage | null | undefined): string {
    const isFirst = this.#isFirst;
    const chunk = {
      ...headOf(this.#job, this.#context, 'text_completion'),
      choices: [this.#choice(pieces, ended)],
      ...(usage === undefined ? {} : { usage }),
    };
    const text = JSON.stringify(chunk);
    return isFirst ? withSeed(text, this.#job) : text;
  }

  #choice(pieces: readonly Piece[], ended: ChatOutput | null): Schemas['CompletionChoice'] {
    const { returnTokenIds, engineRequest, echo } = this.#job;
    const isFirst = this.#isFirst;
    this.#isFirst = false;
    const reason = ended?.finishReason ?? null;
    return {
      index: this.#index,
      text: (isFirst ? echo : '') + pieces.map((piece) => piece.text).join(''),
      finish_reason: reason === 'tool_calls' ? 'stop' : reason,
      logprobs: this.#logprobs(pieces),
      ...(returnTokenIds ? { token_ids: pieces.flatMap((piece) => piece.tokenIds) } : {}),
      ...(returnTokenIds && isFirst ? { prompt_token_ids: engineRequest.promptIds } : {}),
    };
  }

  #logprobs(pieces: readonly Piece[]): Schemas['CompletionLogprobs'] | null {
    const { numLogprobs } = this.#job.engineRequest.sampling;
    if (numLogprobs < 0) return null;
    const entries = pieces.flatMap((piece) => piece.logprobs);
    return {
      tokens: entries.map(({ token }) => token),
      token_logprobs: entries.map(({ logprob }) => logprob),
      top_logprobs: numLogprobs === 0 ? null : entries.map(topOf),
      text_offset: entries.map(({ token }) => {
        const offset = this.#offset;
        this.#offset += token.length;
        return offset;
      }),
    };
  }
}

/** The sampled token belongs to the most likely ones in this format, whatever its rank. */
function topOf({ token, logprob, top_logprobs: top }: TokenLogprob): Record<string, number> {
  return { ...Object.fromEntries(top.map((other) => [other.token, other.logprob])), [token]: logprob };
}
