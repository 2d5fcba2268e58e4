/** One registry of error codes and the mapping to the OpenAI error body. No imports of ours. */

/** code -> [HTTP status, OpenAI `type`] */
export const ERROR_CODES = {
  invalid_json: [400, 'invalid_request_error'],
  invalid_type: [400, 'invalid_request_error'],
  invalid_value: [400, 'invalid_request_error'],
  missing_required_parameter: [400, 'invalid_request_error'],
  unsupported_parameter: [400, 'invalid_request_error'],
  unsupported_value: [400, 'invalid_request_error'],
  context_length_exceeded: [400, 'invalid_request_error'],
  token_out_of_vocabulary: [400, 'invalid_request_error'],
  template_error: [400, 'invalid_request_error'],
  previous_response_not_found: [400, 'invalid_request_error'],
  websocket_stream_limit_reached: [400, 'invalid_request_error'],
  websocket_connection_limit_reached: [400, 'invalid_request_error'],
  invalid_api_key: [401, 'authentication_error'],
  origin_not_allowed: [403, 'permission_error'],
  model_not_found: [404, 'invalid_request_error'],
  not_found: [404, 'invalid_request_error'],
  method_not_allowed: [405, 'invalid_request_error'],
  not_reasoning: [409, 'invalid_request_error'],
  request_too_large: [413, 'invalid_request_error'],
  unsupported_media_type: [415, 'invalid_request_error'],
  upgrade_required: [426, 'invalid_request_error'],
  queue_full: [429, 'rate_limit_error'],
  engine_failed: [500, 'server_error'],
  non_finite_logits: [500, 'server_error'],
  internal_error: [500, 'server_error'],
  model_loading: [503, 'server_error'],
  engine_restarting: [503, 'server_error'],
  shutting_down: [503, 'server_error'],
} as const satisfies Record<string, readonly [number, string]>;

export type ErrorCode = keyof typeof ERROR_CODES;

export interface ErrorBody {
  error: { message: string; type: string; param: string | null; code: string };
}

/** An error a client is told about: status, OpenAI type, `code`, `param` and a sentence that says what to do. */
export class ApiError extends Error {
  readonly code: ErrorCode;
  readonly param: string | null;

  constructor(code: ErrorCode, message: string, param: string | null = null) {
    super(message);
    this.name = 'ApiError';
    this.code = code;
    this.param = param;
  }

  get status(): number {
    return ERROR_CODES[this.code][0];
  }

  toBody(): ErrorBody {
    return { error: { message: this.message, type: ERROR_CODES[this.code][1], param: this.param, code: this.code } };
  }
}

/** An error at start-up (checkpoint, flags): one sentence for the terminal, exit code 1, no stack trace. */
export class StartupError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'StartupError';
  }
}
