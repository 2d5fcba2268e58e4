import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { EngineHandle, EngineStats } from './engine/request.js';

/** What one completion looked like from outside; times in seconds. */
export interface CompletionRecord {
  promptTokens: number;
  maxTokens: number;
  numTokens: number;
  numReasoning: number;
  /** what ended the reasoning; null where it ended by itself */
  reasoningEnded: string | null;
  /** stop, length, tool_calls, or abort and error where it was cut short */
  finishReason: string;
  total: number;
  toFirstToken: number | null;
  toFirstAnswer: number | null;
  reasoning: number | null;
  /** until its first step, from there to its first token, from there to its last */
  queue: number | null;
  prefill: number | null;
  decode: number | null;
}

const SECONDS = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800];
const TOKENS = [1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072];

/** Prometheus metrics of one server: `vllm:` names where the meaning is the same, `rodin:` ones of our own. */
export class Metrics {
  readonly registry = new Registry();
  readonly #engine: EngineHandle;
  readonly #success;
  readonly #ended;
  readonly #timeToFirstToken;
  readonly #timeToFirstAnswer;
  readonly #reasoningTime;
  readonly #interTokenLatency;
  readonly #e2eLatency;
  readonly #queueTime;
  readonly #prefillTime;
  readonly #decodeTime;
  readonly #promptTokens;
  readonly #generationTokens;
  readonly #reasoningTokens;
  readonly #maxTokens;
  readonly #responses;
  readonly #websockets;
  readonly #reasoningEnded;

  constructor(engine: EngineHandle, modelName: string) {
    this.#engine = engine;
    this.registry.setDefaultLabels({ model_name: modelName, engine: '0' });
    this.#addEngineMetrics();
    const registers = [this.registry];
    const seconds = (name: string, help: string): Histogram =>
      new Histogram({ name, help, buckets: SECONDS, registers });
    const tokens = (name: string, help: string): Histogram => new Histogram({ name, help, buckets: TOKENS, registers });
    this.#success = new Counter({
      name: 'vllm:request_success_total',
      help: 'Completions that ended by themselves.',
      labelNames: ['finished_reason'],
      registers,
    });
    this.#ended = new Counter({
      name: 'rodin:completions_total',
      help: 'Completions by how they ended, abort and error included.',
      labelNames: ['finish_reason'],
      registers,
    });
    this.#responses = new Counter({
      name: 'rodin:http_responses_total',
      help: 'HTTP responses by operation and status.',
      labelNames: ['operation', 'status'],
      registers,
    });
    this.#websockets = new Gauge({ name: 'rodin:websockets', help: 'WebSockets that are open.', registers });
    this.#reasoningEnded = new Counter({
      name: 'rodin:reasoning_ended_total',
      help: 'Completions whose reasoning was ended for the model.',
      labelNames: ['reason'],
      registers,
    });
    this.#timeToFirstToken = seconds('vllm:time_to_first_token_seconds', 'From request to first token.');
    this.#timeToFirstAnswer = seconds(
      'rodin:time_to_first_answer_token_seconds',
      'From request to first answer token.',
    );
    this.#reasoningTime = seconds('rodin:reasoning_duration_seconds', 'From first to last reasoning token.');
    this.#interTokenLatency = seconds('vllm:inter_token_latency_seconds', 'Time between tokens.');
    this.#e2eLatency = seconds('vllm:e2e_request_latency_seconds', 'From request to last token.');
    this.#queueTime = seconds('vllm:request_queue_time_seconds', 'From submission to first step.');
    this.#prefillTime = seconds('vllm:request_prefill_time_seconds', 'From first step to first token.');
    this.#decodeTime = seconds('vllm:request_decode_time_seconds', 'From first to last token.');
    this.#promptTokens = tokens('vllm:request_prompt_tokens', 'Prompt tokens of a request.');
    this.#generationTokens = tokens('vllm:request_generation_tokens', 'Completion tokens of a request.');
    this.#reasoningTokens = tokens('rodin:request_reasoning_tokens', 'Reasoning tokens of a request.');
    this.#maxTokens = tokens('vllm:request_params_max_tokens', 'Token limit of a request.');
  }

  observeCompletion(record: CompletionRecord): void {
    const { finishReason, numTokens, numReasoning, total, toFirstToken, toFirstAnswer, reasoning } = record;
    this.#ended.inc({ finish_reason: finishReason });
    if (finishReason !== 'abort' && finishReason !== 'error') this.#success.inc({ finished_reason: finishReason });
    if (record.reasoningEnded !== null) this.#reasoningEnded.inc({ reason: record.reasoningEnded });
    this.#promptTokens.observe(record.promptTokens);
    this.#maxTokens.observe(record.maxTokens);
    this.#generationTokens.observe(numTokens);
    this.#reasoningTokens.observe(numReasoning);
    this.#e2eLatency.observe(total);
    if (toFirstToken !== null) this.#timeToFirstToken.observe(toFirstToken);
    if (toFirstAnswer !== null) this.#timeToFirstAnswer.observe(toFirstAnswer);
    if (record.queue !== null) this.#queueTime.observe(record.queue);
    if (record.prefill !== null) this.#prefillTime.observe(record.prefill);
    if (record.decode !== null) this.#decodeTime.observe(record.decode);
    if (reasoning !== null) this.#reasoningTime.observe(reasoning);
  }

  /** `count` tokens that came together, `seconds` after the ones before */
  observeTokens(count: number, seconds: number): void {
    for (let i = 0; i < count; i++) this.#interTokenLatency.observe(seconds / count);
  }

  observeResponse(operation: string, status: number): void {
    this.#responses.inc({ operation, status: String(status) });
  }

  observeWebSockets(num: number): void {
    this.#websockets.set(num);
  }

  /** Values that the engine keeps are read when they are asked for. */
  #addEngineMetrics(): void {
    const engine = this.#engine;
    const registers = [this.registry];
    const gauge = (name: string, help: string, value: (stats: EngineStats) => number): void => {
      new Gauge({
        name,
        help,
        registers,
        collect() {
          this.set(value(engine.stats()));
        },
      });
    };
    const counter = (name: string, help: string, value: (stats: EngineStats) => number): void => {
      new Counter({
        name,
        help,
        registers,
        collect() {
          this.reset();
          this.inc(value(engine.stats()));
        },
      });
    };
    gauge('vllm:num_requests_running', 'Sequences in steps.', (stats) => stats.numRunning);
    gauge('vllm:num_requests_waiting', 'Sequences that wait.', (stats) => stats.numWaiting);
    gauge('vllm:kv_cache_usage_perc', 'Share of cache blocks that sequences hold, 0 to 1.', (stats) =>
      stats.numBlocks === 0 ? 0 : numReferenced(stats) / stats.numBlocks,
    );
    counter('vllm:prompt_tokens_total', 'Prompt tokens of scheduled requests.', (stats) => stats.promptTokens);
    counter('vllm:generation_tokens_total', 'Tokens generated.', (stats) => stats.generationTokens);
    counter('rodin:prewarmed_tokens_total', 'Prompt tokens computed in idle time.', (stats) => stats.prewarmedTokens);
    counter('vllm:prefix_cache_queries_total', 'Prompt tokens looked up.', (stats) => stats.prefixCacheQueries);
    counter('vllm:prefix_cache_hits_total', 'Prompt tokens found.', (stats) => stats.prefixCacheHits);
    counter('vllm:num_preemptions_total', 'Sequences preempted.', (stats) => stats.numPreemptions);
    counter(
      'vllm:spec_decode_num_drafts_total',
      'Times that drafts of a sequence were verified.',
      (stats) => stats.specNumDrafts,
    );
    counter('vllm:spec_decode_num_draft_tokens_total', 'Drafts verified.', (stats) => stats.specNumDraftTokens);
    counter('vllm:spec_decode_num_accepted_tokens_total', 'Drafts accepted.', (stats) => stats.specNumAcceptedTokens);
    new Counter({
      name: 'vllm:spec_decode_num_accepted_tokens_per_pos_total',
      help: 'Drafts accepted at each depth.',
      labelNames: ['position'],
      registers,
      collect() {
        this.reset();
        for (const [position, count] of engine.stats().specAcceptedPerPos.entries()) this.inc({ position }, count);
      },
    });
    counter(
      'rodin:engine_restarts_total',
      'Engine processes started after one had died.',
      (stats) => stats.numRestarts,
    );
    counter('rodin:steps_total', 'Steps computed.', (stats) => stats.numSteps);
    new Gauge({
      name: 'rodin:blocks',
      help: 'Cache blocks by state; free, cached and referenced make up all.',
      labelNames: ['state'],
      registers,
      collect() {
        const stats = engine.stats();
        this.set({ state: 'free' }, stats.numFreeBlocks);
        this.set({ state: 'cached' }, stats.numCachedBlocks);
        this.set({ state: 'referenced' }, numReferenced(stats));
      },
    });
    new Gauge({
      name: 'rodin:ready',
      help: '1 while requests are served.',
      registers,
      collect() {
        this.set(engine.state().status === 'ready' ? 1 : 0);
      },
    });
    new Gauge({
      name: 'vllm:cache_config_info',
      help: 'Layout of the cache; always 1.',
      labelNames: ['block_size', 'num_gpu_blocks'],
      registers,
      collect() {
        const { blockSize, numBlocks } = engine.stats();
        this.reset();
        this.set({ block_size: String(blockSize), num_gpu_blocks: String(numBlocks) }, 1);
      },
    });
  }
}

function numReferenced(stats: EngineStats): number {
  return stats.numBlocks - stats.numFreeBlocks - stats.numCachedBlocks;
}
