import { ApiError } from '../errors.js';
import { isObject, refuseFields, type Json, type Refusal } from './unsupported.js';

const CHAT_ONLY = 'it is a field of /v1/chat/completions; remove it or send the request there';
const CHAT_FORMAT = "use 'text.format'";
const NO_TEMPLATES = 'prompts are not kept here; send them as input';

/** Fields of the Responses API, or of this server's chat API, that change results there and are not supported here. */
export const REFUSED_RESPONSES: Readonly<Record<string, Refusal>> = {
  context_management: { advice: 'nothing is taken out of a conversation; leave out what the model should not see' },
  conversation: { advice: "use 'previous_response_id', or send the items again" },
  frequency_penalty: { accepts: [0], advice: CHAT_ONLY },
  generate: { accepts: [true], advice: 'a prompt is only computed ahead over a WebSocket' },
  ignore_eos: { accepts: [false], advice: CHAT_ONLY },
  logit_bias: { advice: CHAT_ONLY },
  logprobs: { accepts: [false], advice: "use 'top_logprobs' and 'include'" },
  max_completion_tokens: { advice: "use 'max_output_tokens'" },
  max_tokens: { advice: "use 'max_output_tokens'" },
  messages: { advice: "use 'input'" },
  min_tokens: { accepts: [0], advice: CHAT_ONLY },
  moderation: { advice: 'nothing is moderated here; remove it' },
  n: { accepts: [1], advice: 'send the request several times' },
  presence_penalty: { accepts: [0], advice: CHAT_ONLY },
  prompt: { advice: NO_TEMPLATES },
  prompt_cache_options: { advice: 'prefixes are cached by themselves; remove it' },
  prompt_cache_retention: { accepts: ['in_memory'], advice: 'prefixes stay as long as there is room; remove it' },
  reasoning_effort: { advice: "use 'reasoning.effort'" },
  repetition_penalty: { advice: CHAT_ONLY },
  response_format: { advice: CHAT_FORMAT },
  return_token_ids: { accepts: [false], advice: CHAT_ONLY },
  stop: { advice: CHAT_ONLY },
  stop_token_ids: { advice: CHAT_ONLY },
  stream_id: { advice: 'it names a lane of a WebSocket' },
  structured_outputs: { advice: CHAT_FORMAT },
  thinking: { advice: "use 'reasoning.effort'" },
};

/** of one tool */
const REFUSED_IN_TOOL: Readonly<Record<string, Refusal>> = {
  defer_loading: { accepts: [false], advice: 'every tool is shown to the model; remove it' },
};

/** Throws ApiError for the first thing in a request for a response that is known and not supported. */
export function refuseUnsupportedInResponses(body: Json): void {
  refuseFields(body, REFUSED_RESPONSES);
  const { tools, tool_choice: choice, stream_options: streamOptions, reasoning } = body;
  if (Array.isArray(tools)) tools.forEach(refuseTool);
  if (isObject(choice) && choice['type'] !== 'function' && choice['type'] !== 'allowed_tools') {
    refuse('tool_choice.type', 'it must be function or allowed_tools: there are no other tools');
  }
  if (isObject(streamOptions) && streamOptions['include_obfuscation'] === true) {
    refuse('stream_options.include_obfuscation', 'deltas are sent as they are');
  }
  if (!isObject(reasoning)) return;
  const { summary, generate_summary: older } = reasoning;
  if (summary === 'concise' || summary === 'detailed') refuse('reasoning.summary', NO_SUMMARY);
  if (older !== undefined && older !== null && older !== 'auto') refuse('reasoning.generate_summary', NO_SUMMARY);
}

const NO_SUMMARY = "reasoning is sent as it is and not summed up; leave it out, or say 'auto'";

function refuseTool(tool: unknown, index: number): void {
  if (!isObject(tool)) return;
  const { type, allowed_callers: callers } = tool;
  if (typeof type === 'string' && type !== 'function') {
    refuse(`tools[${index}].type`, 'it must be function: tools run at the client');
  }
  if (Array.isArray(callers) && callers.some((caller) => caller !== 'direct')) {
    refuse(`tools[${index}].allowed_callers`, 'only the model calls tools; remove it');
  }
  refuseFields(tool, REFUSED_IN_TOOL, `tools[${index}].`);
}

function refuse(param: string, advice: string): never {
  throw new ApiError('unsupported_value', `'${param}' with this value is not supported: ${advice}.`, param);
}
