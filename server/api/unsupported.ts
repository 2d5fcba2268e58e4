import { ApiError } from '../errors.js';

export interface Refusal {
  /** values that mean what this server does anyway */
  accepts?: readonly unknown[];
  advice: string;
}

const REMOVE = 'remove it';

/** Fields that change results on other servers and are not supported here: refused, never ignored. */
export const REFUSED: Readonly<Record<string, Refusal>> = {
  allowed_token_ids: { advice: "use 'logit_bias' for a few tokens" },
  audio: { advice: 'only text is generated; remove it' },
  bad_words: { advice: "use 'logit_bias' with -100" },
  best_of: { accepts: [1], advice: REMOVE },
  chat_template: { advice: "the checkpoint's own template is used; remove it" },
  documents: { advice: 'put the documents into a message' },
  echo: { accepts: [false], advice: REMOVE },
  function_call: { accepts: ['auto', 'none'], advice: "use 'tools' and 'tool_choice'" },
  functions: { advice: "use 'tools'" },
  include_stop_str_in_output: { accepts: [false], advice: REMOVE },
  length_penalty: { accepts: [1], advice: REMOVE },
  logits_processors: { advice: REMOVE },
  prediction: { advice: REMOVE },
  prompt_logprobs: { accepts: [false], advice: REMOVE },
  repetition_detection: { advice: REMOVE },
  service_tier: { accepts: ['auto', 'default'], advice: REMOVE },
  skip_special_tokens: { accepts: [true], advice: REMOVE },
  stop_regex: { advice: "use 'stop'" },
  truncate_prompt_tokens: { advice: 'shorten the conversation' },
  typical_p: { accepts: [1], advice: "use 'top_p' or 'min_p'" },
  use_beam_search: { accepts: [false], advice: REMOVE },
  verbosity: { advice: REMOVE },
  web_search_options: { advice: REMOVE },
};

/** The same for /v1/completions, beside what is refused everywhere. */
export const REFUSED_TEXT: Readonly<Record<string, Refusal>> = {
  suffix: { accepts: [''], advice: 'these models complete at the end alone; put everything into the prompt' },
  vote: { accepts: [false], advice: 'only answers of conversations are voted on; use /v1/chat/completions' },
  prompt_embeds: { advice: "send 'prompt'" },
  ...Object.fromEntries(
    [
      ...['structured_outputs', 'response_format', 'guided_json', 'guided_regex', 'guided_choice', 'guided_grammar'],
      ...['json_schema', 'regex', 'ebnf', 'grammar', 'tools', 'tool_choice', 'reasoning_effort', 'reasoning'],
      ...['thinking', 'thinking_token_budget', 'chat_template_kwargs', 'messages'],
    ].map((name) => [name, { advice: 'it belongs to conversations; use /v1/chat/completions' }]),
  ),
};

export type Json = Record<string, unknown>;

/** Throws ApiError for the first field with a value that is not accepted; `prefix` is where the fields are. */
export function refuseFields(fields: Json, refused: Readonly<Record<string, Refusal>>, prefix = ''): void {
  for (const [name, value] of Object.entries(fields)) {
    const refusal = Object.hasOwn(refused, name) ? refused[name] : undefined;
    if (!refusal || value === null || refusal.accepts?.includes(value)) continue;
    const code = refusal.accepts ? 'unsupported_value' : 'unsupported_parameter';
    const param = prefix + name;
    throw new ApiError(
      code,
      `'${param}'${refusal.accepts ? ' with this value' : ''} is not supported: ${refusal.advice}.`,
      param,
    );
  }
}

/** Throws ApiError for the first thing in a request that is known and not supported by its operation. */
export function refuseUnsupported(body: Json, knownFields: ReadonlySet<string>, isText = false): void {
  const refused: Readonly<Record<string, Refusal>> = isText ? { ...REFUSED, ...REFUSED_TEXT } : REFUSED;
  refuseFields(Object.fromEntries(Object.entries(body).filter(([name]) => !knownFields.has(name))), refused);
  const { modalities } = body;
  if (Array.isArray(modalities) && modalities.some((modality) => modality !== 'text')) {
    throw new ApiError('unsupported_value', '\'modalities\' must be ["text"]: only text is generated.', 'modalities');
  }
  if (Array.isArray(body['messages'])) body['messages'].forEach(refuseMessage);
  if (Array.isArray(body['tools'])) body['tools'].forEach(refuseTool);
}

function refuseMessage(message: unknown, index: number): void {
  if (!isObject(message)) return;
  const param = `messages[${index}]`;
  if (message['role'] === 'function') {
    throw new ApiError(
      'unsupported_value',
      `'${param}.role' must be tool: functions are called tools here.`,
      `${param}.role`,
    );
  }
  if (message['function_call'] !== undefined && message['function_call'] !== null) {
    throw new ApiError(
      'unsupported_parameter',
      `'${param}.function_call' is not supported: use tool_calls.`,
      `${param}.function_call`,
    );
  }
  if (message['audio'] !== undefined && message['audio'] !== null) {
    throw new ApiError(
      'unsupported_parameter',
      `'${param}.audio' is not supported: the model reads text only.`,
      `${param}.audio`,
    );
  }
  if (!Array.isArray(message['content'])) return;
  message['content'].forEach((part: unknown, at) => {
    const type = isObject(part) ? part['type'] : undefined;
    if (typeof type === 'string' && type !== 'text') {
      const where = `${param}.content[${at}].type`;
      throw new ApiError(
        'unsupported_value',
        `'${where}' must be text: the model reads text only, not ${type.slice(0, 40)}.`,
        where,
      );
    }
  });
}

function refuseTool(tool: unknown, index: number): void {
  if (!isObject(tool)) return;
  const type = tool['type'];
  if (typeof type === 'string' && type !== 'function') {
    const param = `tools[${index}].type`;
    throw new ApiError('unsupported_value', `'${param}' must be function.`, param);
  }
}

export function isObject(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
