import type { TokenLogprobs } from '../engine/request.js';
import type { Tokenizer } from '../text/tokenizer.js';
import type { Piece } from './chat-output.js';
import type { components } from './openapi.js';

export type TokenLogprob = components['schemas']['TokenLogprob'];

/** JSON has no minus infinity. */
const LEAST_LOGPROB = -9999;

export function toTokenLogprob(id: number, { logprob, top }: TokenLogprobs, tokenizer: Tokenizer): TokenLogprob {
  const entry = (tokenId: number, value: number): Omit<TokenLogprob, 'top_logprobs'> => {
    const bytes = tokenizer.bytesOf(tokenId);
    return { token: new TextDecoder().decode(bytes), logprob: Math.max(value, LEAST_LOGPROB), bytes: [...bytes] };
  };
  return { ...entry(id, logprob), top_logprobs: top.map((other) => entry(other.id, other.logprob)) };
}

/** null where the request asked for none */
export function choiceLogprobs(
  pieces: readonly Piece[],
  isAsked: boolean,
): components['schemas']['ChoiceLogprobs'] | null {
  if (!isAsked) return null;
  const of = (kind: Piece['kind']): TokenLogprob[] =>
    pieces.filter((piece) => piece.kind === kind).flatMap((piece) => piece.logprobs);
  const reasoning = of('reasoning');
  const content = of('content');
  return {
    content: content.length || !reasoning.length ? content : null,
    ...(reasoning.length ? { reasoning_content: reasoning } : {}),
    refusal: null,
  };
}
