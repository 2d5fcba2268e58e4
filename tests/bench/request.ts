import { request as httpRequest, type Agent, type IncomingMessage } from 'node:http';
import { request as httpsRequest } from 'node:https';

export interface Target {
  /** base URL of the API, ending in /v1 */
  url: URL;
  apiKey: string | null;
  agent: Agent;
  timeoutMs: number;
}

/** What one request took; times in ms of performance.now(). */
export interface Sample {
  /** when it was due: in an open loop it may have been sent later */
  dueAt: number;
  endedAt: number;
  /** first token of any kind, first token of the answer; null where none came */
  firstTokenAt: number | null;
  firstAnswerAt: number | null;
  lastTokenAt: number | null;
  /** between events with tokens */
  gapsMs: number[]; // [num_events - 1]
  promptTokens: number;
  cachedTokens: number;
  completionTokens: number;
  /** null: it ended as it should */
  error: string | null;
}

/** Sends one streamed chat completion and keeps time. Never throws: what goes wrong is in the sample. */
export function timeRequest(target: Target, body: object, dueAt: number, signal: AbortSignal): Promise<Sample> {
  const sample: Sample = {
    dueAt,
    endedAt: dueAt,
    firstTokenAt: null,
    firstAnswerAt: null,
    lastTokenAt: null,
    gapsMs: [],
    promptTokens: 0,
    cachedTokens: 0,
    completionTokens: 0,
    error: 'the stream ended without [DONE]',
  };
  return new Promise((resolve) => {
    let isEnded = false;
    const end = (error: string | null): void => {
      if (isEnded) return;
      isEnded = true;
      sample.endedAt = performance.now();
      sample.error = error;
      resolve(sample);
    };
    const send = target.url.protocol === 'https:' ? httpsRequest : httpRequest;
    const headers = {
      'content-type': 'application/json',
      ...(target.apiKey === null ? {} : { authorization: `Bearer ${target.apiKey}` }),
    };
    const url = new URL('chat/completions', target.url);
    const request = send(url, { method: 'POST', headers, agent: target.agent, signal, timeout: target.timeoutMs });
    request.on('timeout', () => request.destroy(new Error(`no byte for ${target.timeoutMs} ms`)));
    request.on('error', (error) => end(error.message));
    request.on('response', (response) => {
      readResponse(response, sample).then(end, (error: unknown) => end((error as Error).message));
    });
    request.end(JSON.stringify(body));
  });
}

/** Takes in the whole response; returns what was wrong with it. */
async function readResponse(response: IncomingMessage, sample: Sample): Promise<string | null> {
  response.setEncoding('utf8');
  if (response.statusCode !== 200) {
    let text = '';
    for await (const part of response) if (text.length < 300) text += String(part);
    return `status ${response.statusCode}: ${text.slice(0, 300)}`;
  }
  let rest = '';
  let isDone = false;
  let error: string | null = null;
  for await (const part of response) {
    const lines = (rest + String(part)).split('\n');
    rest = lines.pop()!;
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const data = line.slice('data:'.length).trim();
      if (data === '[DONE]') isDone = true;
      else error ??= onChunk(JSON.parse(data) as Chunk, sample);
    }
  }
  return error ?? (isDone ? null : 'the stream ended without [DONE]');
}

interface Chunk {
  error?: { message?: string };
  choices?: { delta?: Record<string, unknown> }[];
  usage?: {
    prompt_tokens: number;
    completion_tokens: number;
    prompt_tokens_details?: { cached_tokens?: number } | null;
  } | null;
}

function onChunk({ error, choices, usage }: Chunk, sample: Sample): string | null {
  if (error) return error.message ?? 'an error event';
  if (usage) {
    sample.promptTokens = usage.prompt_tokens;
    sample.completionTokens = usage.completion_tokens;
    sample.cachedTokens = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
  const delta = choices?.[0]?.delta ?? {};
  const isAnswer = Boolean(delta['content']) || Array.isArray(delta['tool_calls']);
  if (!isAnswer && !delta['reasoning_content'] && !delta['reasoning']) return null;
  const now = performance.now();
  if (sample.lastTokenAt !== null) sample.gapsMs.push(now - sample.lastTokenAt);
  sample.firstTokenAt ??= now;
  if (isAnswer) sample.firstAnswerAt ??= now;
  sample.lastTokenAt = now;
  return null;
}
