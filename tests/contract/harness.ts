import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { Ajv2020, type ValidateFunction } from 'ajv/dist/2020.js';
import type { FastifyInstance } from 'fastify';
import { parse } from 'yaml';
import type { Drain } from '../../server/api/drain.js';
import type { SseOptions } from '../../server/api/sse.js';
import { buildApp, type AppOptions } from '../../server/app.js';
import { readCommandLine, type ServeConfig } from '../../server/config.js';
import type { EmittedToken } from '../../server/engine/request.js';
import { readCheckpoint } from '../../server/model/checkpoint.js';
import { PromptEncoder } from '../../server/text/prompt-encoder.js';
import { FakeEngine, oneByOne, type Script } from './fake-engine.js';

export const POCKET = fileURLToPath(new URL('../../models/pocket-r1', import.meta.url));
export const DOCUMENT = new URL('../../openapi/openapi.yaml', import.meta.url);

export interface Harness {
  app: FastifyInstance;
  engine: FakeEngine;
  prompts: PromptEncoder;
  /** listens and returns the address */
  listen: () => Promise<string>;
  /** POSTs a chat request */
  chat: (
    body: unknown,
    headers?: Record<string, string>,
  ) => Promise<{ status: number; body: any; text: string; headers: any }>;
  /** 'reasoning' tokens, </think>, answer tokens, end of sequence */
  thought: (reasoning: string, answer: string) => EmittedToken[];
  tokens: (text: string, phase: EmittedToken['phase']) => EmittedToken[];
  close: () => Promise<void>;
}

export function configOf(...args: string[]): ServeConfig {
  const command = readCommandLine(['serve', ...args], {});
  if (command.kind !== 'serve') throw new Error('not a serve command');
  return command.config;
}

export function startHarness(
  options: { args?: string[]; script?: Script; drain?: Drain; sse?: SseOptions } & Pick<
    AppOptions,
    'tracer' | 'logger' | 'responses'
  > = {},
): Harness {
  const config = configOf(...(options.args ?? []));
  const prompts = PromptEncoder.read(POCKET, config.reasoningFormat === 'r1-zero' ? 'r1-zero' : 'marked');
  const tokens = (text: string, phase: EmittedToken['phase']): EmittedToken[] =>
    prompts.tokenizer.encodeText(text).map((id) => ({ id, phase }));
  const thought = (reasoning: string, answer: string): EmittedToken[] => [
    ...tokens(reasoning, 'reasoning'),
    { id: 6, phase: 'control' },
    ...tokens(answer, 'answer'),
    { id: 1, phase: 'control' },
  ];
  const engine = new FakeEngine(options.script ?? oneByOne(thought('Let me see.', 'It is 4.')));
  const checkpoint = readCheckpoint(POCKET);
  const { drain, sse, tracer, logger, responses } = options;
  if (engine.engineState.status === 'ready' && config.maxModelLen !== null) {
    engine.engineState.maxContext = config.maxModelLen;
  }
  const app = buildApp({
    config,
    checkpoint,
    prompts,
    engine,
    ...(drain ? { drain } : {}),
    ...(sse ? { sse } : {}),
    ...(tracer ? { tracer } : {}),
    ...(logger ? { logger } : {}),
    ...(responses ? { responses } : {}),
  });
  return {
    app,
    engine,
    prompts,
    tokens,
    thought,
    async chat(body, headers = {}) {
      const payload = typeof body === 'string' ? body : JSON.stringify(body);
      const response = await app.inject({
        method: 'POST',
        url: '/v1/chat/completions',
        headers: { 'content-type': 'application/json', ...headers },
        payload,
      });
      const isJson = String(response.headers['content-type']).startsWith('application/json');
      const { statusCode: status, body: text } = response;
      return { status, text, body: isJson ? JSON.parse(text) : null, headers: response.headers };
    },
    listen: () => app.listen({ host: '127.0.0.1', port: 0 }),
    async close() {
      await app.close();
      await prompts.close();
    },
  };
}

/** Data of each event; comments are left out. */
export function eventsOf(sse: string): any[] {
  const data = sse.split('\n\n').flatMap((part) => /^data: (.*)$/m.exec(part)?.[1] ?? []);
  return data.map((text) => (text === '[DONE]' ? text : JSON.parse(text)));
}

/** Validators of a document's component schemas, ours or OpenAI's. */
export function validatorsOf(file: string | URL): (name: string) => ValidateFunction {
  const document = parse(readFileSync(file, 'utf8'), { maxAliasCount: -1 }) as { components: { schemas: object } };
  const ajv = new Ajv2020({ strict: false, allErrors: true, validateFormats: false });
  ajv.addSchema({ $id: 'document', components: withNullableEnums(document.components) });
  return (name) => ajv.compile({ $ref: `document#/components/schemas/${name}` });
}

/** OpenAI's document says `nullable`, which JSON Schema does not know: null becomes a type and an enum value. */
function withNullableEnums(node: any): any {
  if (Array.isArray(node)) return node.map(withNullableEnums);
  if (typeof node !== 'object' || node === null) return node;
  const { nullable, ...rest } = node;
  delete rest.discriminator;
  const mapped = Object.fromEntries(Object.entries(rest).map(([key, value]) => [key, withNullableEnums(value)]));
  return nullable === true ? { anyOf: [mapped, { type: 'null' }] } : mapped;
}

export const QUESTION = { model: 'pocket-r1', messages: [{ role: 'user', content: 'What is 2 + 2?' }] };
