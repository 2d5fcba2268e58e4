import type { AttributeValue, OtlpExporter, Span } from './otlp.js';
import { newSpanId, readTraceContext, type TraceContext } from './trace-context.js';

/** One completion as a trace shows it. Times are of performance.now(). */
export interface TracedCompletion {
  id: string;
  model: string;
  operation: 'chat' | 'text_completion';
  sampling: {
    temperature: number;
    topP: number;
    topK: number;
    maxTokens: number;
    presencePenalty: number;
    frequencyPenalty: number;
    seed: bigint;
  };
  promptTokens: number;
  cachedTokens: number;
  completionTokens: number;
  reasoningTokens: number;
  finishReason: string;
  /** code of an error; null where there was none */
  errorCode: string | null;
  startedAt: number;
  /** given to the engine */
  submittedAt: number;
  /** first step; null where it never ran */
  scheduledAt: number | null;
  firstTokenAt: number | null;
  lastTokenAt: number | null;
  endedAt: number;
}

/** Sends a completion's spans: the whole, and in it queue, prefill and decode. Names: GenAI semantic conventions. */
export class CompletionTracer {
  readonly #exporter: Pick<OtlpExporter, 'add'>;
  /** request -> its trace, the same for all of its completions */
  readonly #contexts = new WeakMap<object, TraceContext>();

  constructor(exporter: Pick<OtlpExporter, 'add'>) {
    this.#exporter = exporter;
  }

  contextOf(request: { headers: Readonly<Record<string, string | string[] | undefined>> }): TraceContext {
    const known = this.#contexts.get(request);
    if (known) return known;
    const context = readTraceContext(request.headers['traceparent']);
    this.#contexts.set(request, context);
    return context;
  }

  trace(context: TraceContext, completion: TracedCompletion): void {
    if (!context.isSampled) return;
    const { startedAt, submittedAt, scheduledAt, firstTokenAt, lastTokenAt, endedAt, errorCode } = completion;
    const whole: Span = {
      traceId: context.traceId,
      spanId: newSpanId(),
      parentSpanId: context.parentSpanId,
      name: `${completion.operation} ${completion.model}`,
      kind: 'server',
      startMs: unixMs(startedAt),
      endMs: unixMs(endedAt),
      attributes: attributesOf(completion),
      error: errorCode,
    };
    const part = (name: string, from: number, to: number, attributes: Span['attributes'] = {}): Span => ({
      ...whole,
      spanId: newSpanId(),
      parentSpanId: whole.spanId,
      name,
      kind: 'internal',
      startMs: unixMs(from),
      endMs: unixMs(to),
      attributes,
      error: null,
    });
    const { promptTokens, cachedTokens, completionTokens } = completion;
    const spans = [whole, part('queue', submittedAt, scheduledAt ?? endedAt)];
    if (scheduledAt !== null) {
      const tokens = { 'rodin.computed_tokens': promptTokens - cachedTokens };
      spans.push(part('prefill', scheduledAt, firstTokenAt ?? endedAt, tokens));
    }
    if (firstTokenAt !== null) {
      const tokens = { 'rodin.generated_tokens': completionTokens };
      spans.push(part('decode', firstTokenAt, lastTokenAt ?? endedAt, tokens));
    }
    this.#exporter.add(spans);
  }
}

function attributesOf(completion: TracedCompletion): Record<string, AttributeValue> {
  const { sampling, errorCode, firstTokenAt, startedAt } = completion;
  return {
    'gen_ai.operation.name': completion.operation,
    'gen_ai.provider.name': 'rodin',
    'gen_ai.request.model': completion.model,
    'gen_ai.response.model': completion.model,
    'gen_ai.response.id': completion.id,
    'gen_ai.response.finish_reasons': [completion.finishReason],
    'gen_ai.request.max_tokens': sampling.maxTokens,
    'gen_ai.request.temperature': sampling.temperature,
    'gen_ai.request.top_p': sampling.topP,
    ...(sampling.topK > 0 ? { 'gen_ai.request.top_k': sampling.topK } : {}),
    'gen_ai.request.presence_penalty': sampling.presencePenalty,
    'gen_ai.request.frequency_penalty': sampling.frequencyPenalty,
    // As text: a seed has 64 bits without sign, an attribute 63.
    'gen_ai.request.seed': String(sampling.seed),
    'gen_ai.usage.input_tokens': completion.promptTokens,
    'gen_ai.usage.output_tokens': completion.completionTokens,
    'gen_ai.usage.cache_read.input_tokens': completion.cachedTokens,
    'gen_ai.usage.reasoning.output_tokens': completion.reasoningTokens,
    ...(firstTokenAt === null ? {} : { 'gen_ai.server.time_to_first_token': (firstTokenAt - startedAt) / 1000 }),
    ...(errorCode === null ? {} : { 'error.type': errorCode }),
  };
}

function unixMs(time: number): number {
  return performance.timeOrigin + time;
}
