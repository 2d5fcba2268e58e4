import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Engine } from '../../server/engine/engine.js';
import type { EngineRequest, SamplingParams } from '../../server/engine/request.js';
import type { EngineConfig } from '../../server/engine/start-engine.js';
import type { TemplateInput } from '../../server/text/chat-template.js';
import { PromptEncoder } from '../../server/text/prompt-encoder.js';
import { FIXTURES, POCKET_R1 } from './checkpoint-copy.js';
import { TEST_DEVICE } from './device.js';
import { makeRequest } from './fake-runner.js';

/** Whatever an engine can be asked for, in any surroundings: what comes out must not depend on drafts. */

export const ENGINE_CONFIG: EngineConfig = {
  model: POCKET_R1,
  device: TEST_DEVICE,
  compute: 'auto',
  cpuPath: 'auto',
  numThreads: 2,
  blockSize: 16,
  cacheMemory: 64 * 2 ** 20,
  gpuMemoryUtilization: null,
  kvCacheDtype: 'auto',
  deterministic: true,
  maxModelLen: null,
  maxStepTokens: 256,
  maxNumSeqs: 32,
  maxQueue: 128,
  speculativeTokens: 0,
};

/** A GPU has another attention kernel, with bits of its own, where 8 does not divide a block. */
const SMALL_BLOCKS = TEST_DEVICE === 'cpu' ? 4 : 8;

/** Surroundings that must change no output either. The smallest cache holds one long sequence and little more. */
export const SETUPS: Record<string, Partial<EngineConfig>> = {
  'batches of up to 32': {},
  'chunks of up to 16 tokens': { maxStepTokens: 16, maxNumSeqs: 8, blockSize: SMALL_BLOCKS },
  'a small cache': { maxStepTokens: 64, maxNumSeqs: 16, blockSize: 8, cacheMemory: 3 * 2 ** 20, maxModelLen: 360 },
};

/** Prompts of the evaluation set, encoded; those of one task share a prefix. */
export async function evaluationPrompts(): Promise<number[][]> {
  const encoder = PromptEncoder.read(POCKET_R1);
  const lines = readFileSync(join(FIXTURES, 'pocket-r1-reference/eval.jsonl'), 'utf8').trimEnd().split('\n');
  const prompts: number[][] = [];
  for (const line of lines) {
    const { messages, thinking } = JSON.parse(line) as { messages: TemplateInput['messages']; thinking: boolean };
    prompts.push((await encoder.encode({ messages, thinking, tools: null })).ids);
  }
  await encoder.close();
  return prompts;
}

const TEMPERATURES = [0, 0.3, 0.6, 1];
const EOS = 1;

/** The options of request `index`: each kind meets each temperature. */
function samplingOf(index: number, prompt: readonly number[]): Partial<SamplingParams> {
  const base = {
    temperature: TEMPERATURES[index % 4]!,
    seed: (BigInt(index) * 0x9e3779b97f4a7c15n) & 0xffffffffffffffffn,
    maxTokens: 8 + ((index * 37) % 90),
    stopTokenIds: [EOS],
  };
  const common = prompt.slice(-8);
  switch (Math.floor(index / 4) % 9) {
    case 0:
      return { ...base, presencePenalty: 0.7, frequencyPenalty: 0.4, repetitionPenalty: 1.15 };
    case 1:
      return {
        ...base,
        logitBias: [
          [common[0]!, 3],
          [common[1]!, -Infinity],
          [34, 1.5],
        ],
      };
    case 2:
      return { ...base, stopTokenIds: [EOS, 34, 35, common[2]!] }; // digits: stops in the middle
    case 3:
      return { ...base, stopTokenIds: [EOS, 33, 36, 521], minTokens: Math.min(base.maxTokens, 5 + (index % 11)) };
    case 4:
      return { ...base, topK: 5, topP: 0.9, minP: 0.02 };
    case 5:
      return { ...base, numLogprobs: index % 3 };
    case 6:
      return { ...base, stopTokenIds: [], maxTokens: 1 + (index % 7) };
    case 7:
      return { ...base, frequencyPenalty: -0.5, numLogprobs: 0, minTokens: 4, stopTokenIds: [EOS, 37] };
    default:
      return base;
  }
}

/** Reasoning that the engine ends: forced tokens cut the list of accepted ones. */
const THINK_END = 6;
const THINKING: Partial<EngineRequest> = {
  markers: { thinkStart: 5, thinkEnd: THINK_END, toolCallsBegin: -1, toolCallsEnd: -1 },
  startPhase: 'reasoning',
  thinking: { budget: 13, endIds: [34, 35, THINK_END], minAnswerTokens: 3, loopTokens: 8 },
};

export function makeRequests(prompts: readonly number[][], count: number): EngineRequest[] {
  return Array.from({ length: count }, (_, index) => {
    // Every third repeats a prompt, so that the prefix cache has hits of whole prompts too.
    const prompt = prompts[(index % 3 === 2 ? index - 2 : index) % prompts.length]!;
    return makeRequest(`r${index}`, prompt, samplingOf(index, prompt), {
      cacheSalt: index % 5 === 0 ? 'tenant' : '',
      ...(index % 7 === 3 ? THINKING : {}),
    });
  });
}

/** Tokens, log-probabilities to the bit and finish reason of each request, as text. */
export async function outputsOf(
  engine: Engine,
  requests: readonly EngineRequest[],
  maxOpen: number,
): Promise<string[]> {
  const outputs = new Array<string>(requests.length);
  let next = 0;
  const work = async () => {
    while (next < requests.length) {
      const index = next++;
      const request = requests[index]!;
      const parts: string[] = [];
      // A neighbour that leaves after a few events, whatever it was doing.
      const decoy =
        index % 6 === 0 ? leaveEarly(engine, { ...request, requestId: `${request.requestId}-decoy` }, index % 4) : null;
      for await (const { tokens, finishReason, error, stopTokenId } of engine.submit(request)) {
        for (const { id, logprobs } of tokens) parts.push(logprobs ? `${id}:${JSON.stringify(logprobs)}` : `${id}`);
        if (finishReason) parts.push(`${finishReason} ${stopTokenId ?? ''} ${error?.message ?? ''}`);
      }
      outputs[index] = parts.join(' ');
      await decoy;
    }
  };
  await Promise.all(Array.from({ length: maxOpen }, work));
  return outputs;
}

async function leaveEarly(engine: Engine, request: EngineRequest, numEvents: number): Promise<void> {
  let count = 0;
  for await (const event of engine.submit(request)) if (event.finishReason !== undefined || count++ >= numEvents) break;
}
