import type { FastifyBaseLogger } from 'fastify';
import type { EngineHandle, EngineRequest } from '../engine/request.js';
import type { TemplateMessage } from '../text/chat-template.js';
import type { PromptEncoder } from '../text/prompt-encoder.js';
import { turnOf, type AnswerMemory } from './answer-memory.js';
import type { AskedConversation } from './conversation.js';

/** Two questions that begin with different tokens: what prompts with them share is there whatever is asked next. */
const QUESTIONS = ['0', 'A'] as const;

/**
 * Has the engine compute what the next turn's prompt will begin with: the conversation with an answer as the template
 * shows it then, without reasoning. What is cached of the turn as it was sampled is given up for that.
 */
export class Prewarm {
  readonly #isOn: boolean;
  readonly #engine: EngineHandle;
  readonly #prompts: PromptEncoder;
  readonly #answers: AnswerMemory;

  constructor(isOn: boolean, engine: EngineHandle, prompts: PromptEncoder, answers: AnswerMemory) {
    this.#isOn = isOn;
    this.#engine = engine;
    this.#prompts = prompts;
    this.#answers = answers;
  }

  /** An answer has ended, with these tokens. What fails is logged: nobody waits for it. */
  begin(asked: AskedConversation, request: EngineRequest, tokenIds: readonly number[], log: FastifyBaseLogger): void {
    if (!this.#isOn) return;
    this.#begin(asked, request, tokenIds).catch((error: unknown) => log.warn(error, 'a next turn was not prewarmed'));
  }

  async #begin(
    { messages, tools }: AskedConversation,
    request: EngineRequest,
    tokenIds: readonly number[],
  ): Promise<void> {
    const { content } = turnOf(request, tokenIds, this.#prompts);
    if (content === null) return; // an answer that came in pieces is another text
    const answer: TemplateMessage = { role: 'assistant', content: content.text };
    const { cacheSalt, promptIds } = request;
    const prompts = await Promise.all(
      QUESTIONS.map((question) => {
        const recalled = this.#answers.recall([...messages, answer, { role: 'user', content: question }], cacheSalt);
        return this.#prompts.encode({ ...recalled, tools, noGenerationPrompt: true });
      }),
    );
    const [one, other] = prompts.map(({ ids }) => ids) as [number[], number[]];
    const next = one.slice(0, numShared(one, other));
    const supersededIds = [...promptIds, ...tokenIds];
    // Without reasoning the turn stays in the prompt as it was sampled.
    if (numShared(next, supersededIds) >= Math.min(next.length, supersededIds.length)) return;
    this.#engine.prewarm({ promptIds: next, cacheSalt, supersededIds });
  }
}

function numShared(one: readonly number[], other: readonly number[]): number {
  let count = 0;
  while (count < one.length && one[count] === other[count]) count++;
  return count;
}
