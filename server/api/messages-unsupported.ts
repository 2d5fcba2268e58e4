import { ApiError } from '../errors.js';
import { isObject, refuseFields, type Json, type Refusal } from './unsupported.js';

const CHAT_ONLY = 'it is a field of /v1/chat/completions; remove it or send the request there';
const CHAT_FORMAT = "use 'output_config.format' with a JSON schema";

/** Fields of the Messages API, or of this server's chat API, that change results there and are not supported here. */
export const REFUSED_MESSAGES: Readonly<Record<string, Refusal>> = {
  cache_salt: { advice: CHAT_ONLY },
  chat_template_kwargs: { advice: "use 'thinking'" },
  container: { advice: 'tools run at the client; remove it' },
  frequency_penalty: { accepts: [0], advice: CHAT_ONLY },
  functions: { advice: "use 'tools'" },
  ignore_eos: { accepts: [false], advice: CHAT_ONLY },
  logit_bias: { advice: CHAT_ONLY },
  logprobs: { accepts: [false], advice: CHAT_ONLY },
  max_completion_tokens: { advice: "use 'max_tokens'" },
  max_tokens_to_sample: { advice: "use 'max_tokens'" },
  mcp_servers: { advice: "give their tools as 'tools'" },
  min_p: { advice: CHAT_ONLY },
  min_tokens: { accepts: [0], advice: CHAT_ONLY },
  n: { accepts: [1], advice: 'send the request several times' },
  presence_penalty: { accepts: [0], advice: CHAT_ONLY },
  prompt: { advice: "use 'messages'" },
  reasoning_effort: { advice: "use 'output_config.effort'" },
  repetition_penalty: { advice: CHAT_ONLY },
  response_format: { advice: CHAT_FORMAT },
  return_token_ids: { accepts: [false], advice: CHAT_ONLY },
  seed: { advice: CHAT_ONLY },
  speed: { accepts: ['standard'], advice: 'there is one speed; remove it' },
  stop: { advice: "use 'stop_sequences'" },
  stop_token_ids: { advice: "use 'stop_sequences'" },
  structured_outputs: { advice: CHAT_FORMAT },
  top_logprobs: { advice: CHAT_ONLY },
};

/** of one tool */
const REFUSED_IN_TOOL: Readonly<Record<string, Refusal>> = {
  defer_loading: { accepts: [false], advice: 'every tool is shown to the model; remove it' },
  input_examples: { advice: "put the examples into the tool's description" },
};

/** Throws ApiError for the first thing in a Messages request that is known and not supported. */
export function refuseUnsupportedInMessages(body: Json): void {
  refuseFields(body, REFUSED_MESSAGES);
  const { context_management: management, tools } = body;
  if (isObject(management) && editsContext(management)) {
    refuse(
      'context_management',
      'turns are never taken out of a conversation; leave out what the model should not see',
    );
  }
  if (Array.isArray(tools)) tools.forEach(refuseTool);
}

/** Thinking that is kept as it is, which is what an agent may ask for, is no edit. */
function editsContext({ edits }: Json): boolean {
  return Array.isArray(edits) && edits.some((edit) => !isObject(edit) || edit['keep'] !== 'all');
}

function refuseTool(tool: unknown, index: number): void {
  if (!isObject(tool)) return;
  const { type, allowed_callers: callers } = tool;
  if (typeof type === 'string' && type !== 'custom') {
    refuse(`tools[${index}].type`, "tools run at the client: describe it by 'name' and 'input_schema'");
  }
  if (Array.isArray(callers) && callers.some((caller) => caller !== 'direct')) {
    refuse(`tools[${index}].allowed_callers`, 'only the model calls tools; remove it');
  }
  refuseFields(tool, REFUSED_IN_TOOL, `tools[${index}].`);
}

function refuse(param: string, advice: string): never {
  throw new ApiError('unsupported_value', `'${param}' with this value is not supported: ${advice}.`, param);
}
