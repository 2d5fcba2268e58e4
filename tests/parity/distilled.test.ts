/**
 * llama and qwen2 through the engine: the reference's greedy tokens, and one prompt with the same bits whatever is
 * around it. The checkpoints are random, so that a wrong bit soon becomes another token.
 */
import assert from 'node:assert/strict';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import type { Engine } from '../../server/engine/engine.js';
import { loadAddon } from '../../server/engine/load-addon.js';
import type { EmittedToken, EngineRequest } from '../../server/engine/request.js';
import { startEngine, type EngineConfig } from '../../server/engine/start-engine.js';
import { readCheckpoint } from '../../server/model/checkpoint.js';
import { FIXTURES } from '../helpers/checkpoint-copy.js';
import { makeRequest } from '../helpers/fake-runner.js';
import { Reference } from '../helpers/reference.js';

const BLOCK_SIZE = 16;
const NUM_GREEDY = 24;

const CONFIG: Omit<EngineConfig, 'model'> = {
  device: 'cpu',
  compute: 'auto',
  cpuPath: 'auto',
  numThreads: Math.min(2, availableParallelism()),
  blockSize: BLOCK_SIZE,
  cacheMemory: 16 * 2 ** 20,
  gpuMemoryUtilization: null,
  kvCacheDtype: 'auto',
  deterministic: true,
  maxModelLen: null,
  maxStepTokens: 256,
  maxNumSeqs: 64,
  maxQueue: 64,
  speculativeTokens: 0,
};

/** Runs a test against its own engine and checks the block invariant behind it. */
async function withEngine(
  model: string,
  overrides: Partial<EngineConfig>,
  body: (engine: Engine) => Promise<void>,
): Promise<void> {
  const engine = await startEngine(loadAddon(), { ...CONFIG, model, ...overrides });
  try {
    await body(engine);
    engine.checkInvariant();
  } finally {
    await engine.close();
  }
}

interface Output {
  tokens: EmittedToken[];
  cachedTokens: number;
}

async function run(engine: Engine, request: EngineRequest): Promise<Output> {
  const output: Output = { tokens: [], cachedTokens: 0 };
  for await (const event of engine.submit(request)) {
    assert.equal(event.error, undefined);
    output.tokens.push(...event.tokens);
    output.cachedTokens = event.cachedTokens;
  }
  return output;
}

for (const name of ['llama-bf16', 'qwen2-bf16']) {
  const model = join(FIXTURES, name);
  const reference = new Reference(model);
  const prompts = reference.prompts();

  test(`${name}: the engine's greedy tokens in float32 are the reference's`, () =>
    withEngine(model, { compute: 'float32' }, async (engine) => {
      await Promise.all(
        prompts.map(async (promptIds, index) => {
          const expected = [...reference.ints(`greedy.${index}`)];
          assert.equal(expected.length, NUM_GREEDY);
          const { tokens } = await run(engine, makeRequest(`${index}`, promptIds, { maxTokens: NUM_GREEDY }));
          assert.deepEqual(
            tokens.map(({ id }) => id),
            expected,
            `prompt ${index}`,
          );
        }),
      );
    }));

  const prompt = prompts.find((ids) => ids.length === 130)!;
  const subject = (cacheSalt: string, maxTokens = NUM_GREEDY): EngineRequest => {
    const sampling = { maxTokens, numLogprobs: 4, temperature: 1, seed: 0x0123456789abcdefn };
    return makeRequest(`subject-${cacheSalt}`, prompt, sampling, { cacheSalt });
  };

  for (const cpuPath of loadAddon().cpuPaths()) {
    test(`${name}, ${cpuPath}: the same bits alone, in a batch, in chunks, after a hit, after a preemption`, async () => {
      let alone: EmittedToken[] = [];
      await withEngine(model, { cpuPath, numThreads: 1 }, async (engine) => {
        alone = (await run(engine, subject('alone'))).tokens;
        assert.equal(alone.length, NUM_GREEDY);
        assert.ok(alone.every(({ logprobs }) => Number.isFinite(logprobs!.logprob)));
      });
      await withEngine(model, { cpuPath }, async (engine) => {
        const crowd = Array.from({ length: 32 }, (_, index) => {
          const others = prompts[index % prompts.length]!;
          return run(engine, makeRequest(`${index}`, others, { maxTokens: 20 }, { cacheSalt: `${index}` }));
        });
        assert.deepEqual((await run(engine, subject('crowd'))).tokens, alone, 'in a batch of 32 others');
        await Promise.all(crowd);
        await run(engine, makeRequest('first', prompt.slice(0, 70), { maxTokens: 1 }, { cacheSalt: 'hit' }));
        const hit = await run(engine, subject('hit'));
        assert.equal(hit.cachedTokens, 64);
        assert.deepEqual(hit.tokens, alone, 'after a prefix hit');
      });
      await withEngine(model, { cpuPath, maxStepTokens: 16, maxNumSeqs: 8 }, async (engine) => {
        assert.deepEqual((await run(engine, subject(''))).tokens, alone, 'in chunks of 16');
      });
      // 22 blocks of 16: sequences of 130 + 150 and 130 + 100 tokens do not fit, and the subject is the younger.
      const { spec } = readCheckpoint(model);
      const bytesPerToken = loadAddon().cacheBytesPerToken({
        spec,
        compute: 'auto',
        device: 'cpu',
        kvCacheDtype: 'auto',
        loadMtp: false,
      });
      assert.equal(bytesPerToken, spec.numHiddenLayers * 2 * spec.numKeyValueHeads * spec.headDim * 2);
      await withEngine(model, { cpuPath, cacheMemory: 22 * BLOCK_SIZE * bytesPerToken }, async (engine) => {
        const older = run(engine, makeRequest('older', prompt, { maxTokens: 150 }, { cacheSalt: 'older' }));
        const { tokens } = await run(engine, subject('preempted', 100));
        await older;
        assert.ok(engine.stats().numPreemptions > 0, 'the subject was preempted');
        await withEngine(model, { cpuPath }, async (roomy) => {
          assert.deepEqual(tokens, (await run(roomy, subject('', 100))).tokens, 'after a preemption');
        });
      });
    });
  }
}
