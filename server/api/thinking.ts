import type { ThinkingLimits } from '../engine/request.js';
import { ApiError } from '../errors.js';
import type { ChatBody } from './chat-request.js';
import type { ApiContext } from './context.js';

/** What a request says about thinking, in whichever of its spellings. */
export interface ThinkingWish {
  /** undefined leaves it to the chat template */
  isEnabled: boolean | undefined;
  /** most reasoning tokens */
  budget: number | null;
  /** most reasoning tokens as a share of the completion's; 1 is no limit */
  share: number | null;
  /** the fields that said so, for errors */
  enabledParam: string;
  budgetParam: string;
}

/** Share of the completion's tokens that reasoning may take, by effort; none switches it off. */
export const EFFORT_SHARES: Readonly<Record<string, number>> = {
  none: 0,
  minimal: 1 / 32,
  low: 1 / 8,
  medium: 1 / 4,
  high: 1 / 2,
  xhigh: 3 / 4,
  max: 1,
};

interface Said<Value> {
  param: string;
  value: Value;
}

/** Throws ApiError where spellings contradict each other. */
export function readThinking(body: ChatBody): ThinkingWish {
  const { thinking, reasoning, chat_template_kwargs: kwargs, think } = body;
  const enabled: Said<boolean>[] = [];
  const budgets: Said<number>[] = [];
  const efforts: Said<number>[] = [];
  const sayEnabled = (param: string, value: boolean | null | undefined): void => {
    if (value !== undefined && value !== null) enabled.push({ param, value });
  };
  const sayBudget = (param: string, value: number | null | undefined): void => {
    if (value === undefined || value === null) return;
    budgets.push({ param, value: value === -1 ? Infinity : value });
    if (value === 0) enabled.push({ param, value: false });
  };
  const sayEffort = (param: string, value: string | number | null | undefined): void => {
    if (value === undefined || value === null) return;
    const share = shareOf(param, value);
    efforts.push({ param, value: share });
    enabled.push({ param, value: share > 0 });
  };
  if (thinking) sayEnabled('thinking.type', thinking.type === 'enabled');
  sayEnabled('chat_template_kwargs.thinking', kwargs?.thinking);
  sayEnabled('chat_template_kwargs.enable_thinking', kwargs?.enable_thinking);
  sayEnabled('enable_thinking', body.enable_thinking);
  sayEnabled('reasoning.enabled', reasoning?.enabled);
  if (typeof think === 'boolean') sayEnabled('think', think);
  else sayEffort('think', think);
  sayEffort('reasoning_effort', body.reasoning_effort);
  sayEffort('reasoning.effort', reasoning?.effort);
  sayEffort('output_config.effort', body.output_config?.effort);
  sayEffort('chat_template_kwargs.reasoning_effort', kwargs?.reasoning_effort);
  sayBudget('thinking.budget_tokens', thinking?.budget_tokens);
  sayBudget('reasoning.max_tokens', reasoning?.max_tokens);
  sayBudget('thinking_budget', body.thinking_budget);
  sayBudget('thinking_token_budget', body.thinking_token_budget);
  sayBudget('max_thinking_tokens', body.max_thinking_tokens);
  sayBudget('thinking_budget_tokens', body.thinking_budget_tokens);
  sayBudget('reasoning_budget_tokens', body.reasoning_budget_tokens);
  sayBudget('custom_params.thinking_budget', body.custom_params?.thinking_budget);
  sayBudget('chat_template_kwargs.thinking_budget', kwargs?.thinking_budget);
  for (const said of [enabled, budgets, efforts]) refuseContradiction(said);
  const isEnabled = enabled[0]?.value ?? (budgets.length > 0 ? true : undefined);
  return {
    isEnabled,
    budget: budgets[0]?.value ?? null,
    share: efforts[0]?.value ?? null,
    enabledParam: (enabled[0] ?? budgets[0])?.param ?? 'thinking',
    budgetParam: (budgets[0] ?? efforts[0])?.param ?? 'thinking',
  };
}

function shareOf(param: string, effort: string | number): number {
  if (typeof effort === 'number' && effort >= 0 && effort <= 1) return effort;
  const share = Object.hasOwn(EFFORT_SHARES, effort) ? EFFORT_SHARES[effort] : undefined;
  if (share !== undefined) return share;
  const levels = Object.keys(EFFORT_SHARES).join(', ');
  throw new ApiError('invalid_value', `'${param}' must be one of ${levels}, or a number from 0 to 1.`, param);
}

function refuseContradiction(said: readonly Said<boolean | number>[]): void {
  const [first] = said;
  const other = said.find(({ value }) => value !== first!.value);
  if (other === undefined) return;
  const message = `'${first!.param}' and '${other.param}' contradict each other; give one of them.`;
  throw new ApiError('invalid_value', message, other.param);
}

/** A switch or a limit that the model does not have must not look as if it worked. */
export function checkThinking(wish: ThinkingWish, body: ChatBody, { prompts }: ApiContext): void {
  const { isEnabled, budget, share, enabledParam, budgetParam } = wish;
  if (prompts.form === 'r1-zero' && isEnabled === false) {
    throw new ApiError('unsupported_value', 'This model always reasons; leave thinking on.', enabledParam);
  }
  const canEnd = prompts.markers.thinkEnd >= 0;
  const isTagged = prompts.form === 'r1-zero';
  if (isEnabled === true && !canEnd && !isTagged) {
    const message = `This model does not reason; remove '${enabledParam}'.`;
    throw new ApiError('unsupported_value', message, enabledParam);
  }
  const limit =
    budget !== null && budget !== Infinity ? budget : share !== null && share > 0 && share < 1 ? share : null;
  if (!canEnd && (limit !== null || body.min_answer_tokens)) {
    const param = limit === null ? 'min_answer_tokens' : budgetParam;
    const message = `This model's reasoning has no end marker that could be forced; remove '${param}'.`;
    throw new ApiError('unsupported_parameter', message, param);
  }
}

/** Completions below this are cut where their limit says, with nothing kept back unless asked for. */
const MIN_TOKENS_FOR_RESERVE = 512;
const RESERVE_SHARE = 1 / 8;
const MAX_RESERVE = 1024;
/** A closing phrase is only worth its tokens in reasoning of several times its length. */
const PHRASES_PER_BUDGET = 4;

/** The limits for the engine; undefined where the model has no marker to end reasoning with. */
export function thinkingLimits(
  wish: ThinkingWish,
  body: Pick<ChatBody, 'min_answer_tokens' | 'thinking_loop_tokens'>,
  maxTokens: number,
  { prompts, config }: ApiContext,
): ThinkingLimits | undefined {
  const { thinkEnd } = prompts.markers;
  if (thinkEnd < 0) return undefined;
  const isOff = wish.isEnabled === false;
  const share = wish.share === null || wish.share === 1 ? Infinity : Math.max(1, Math.floor(wish.share * maxTokens));
  // Where reasoning is off there is nothing to limit.
  const total = isOff ? Infinity : (wish.budget ?? share);
  const wanted = body.min_answer_tokens ?? null;
  const reserve =
    wanted ?? (maxTokens < MIN_TOKENS_FOR_RESERVE ? 0 : Math.min(MAX_RESERVE, Math.floor(RESERVE_SHARE * maxTokens)));
  if (wanted !== null && !isOff && wanted + 2 > maxTokens) {
    const message = `'min_answer_tokens' is ${wanted}; with reasoning and its end at most ${maxTokens - 2} of the ${maxTokens} tokens can be kept.`;
    throw new ApiError('invalid_value', message, 'min_answer_tokens');
  }
  const phrase = prompts.tokenizer.encodeText(config.thinkingEndPhrase);
  const room = Math.min(total, maxTokens - reserve);
  const hasPhrase = phrase.length > 0 && room >= PHRASES_PER_BUDGET * phrase.length;
  return {
    budget: total - (hasPhrase ? phrase.length : 0),
    endIds: [...(hasPhrase ? phrase : []), thinkEnd],
    extendIds: prompts.tokenizer.encodeText(config.thinkingExtendPhrase),
    minAnswerTokens: reserve,
    loopTokens: body.thinking_loop_tokens ?? config.thinkingLoopTokens,
  };
}
