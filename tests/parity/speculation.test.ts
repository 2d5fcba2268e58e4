import assert from 'node:assert/strict';
import { join } from 'node:path';
import { after, test } from 'node:test';
import type { Engine } from '../../server/engine/engine.js';
import type { NativeAddon } from '../../server/engine/addon.js';
import { loadAddon } from '../../server/engine/load-addon.js';
import type { EngineRequest, EngineStats } from '../../server/engine/request.js';
import { startEngine, type EngineConfig } from '../../server/engine/start-engine.js';
import { MAX_DRAFTS } from '../../server/engine/step-batch.js';
import { CheckpointCopy, FIXTURES, POCKET_R1 } from '../helpers/checkpoint-copy.js';
import { makeRequest } from '../helpers/fake-runner.js';
import { ENGINE_CONFIG, SETUPS, evaluationPrompts, makeRequests, outputsOf } from '../helpers/speculation-workload.js';

/** 2,000 of them were run by hand: SPECULATION_REQUESTS=2000 */
const NUM_REQUESTS = Number(process.env['SPECULATION_REQUESTS'] ?? 90);
/** drafts that pocket-r1's module was trained for */
const TRAINED_DEPTH = 4;
/** of a norm's 512 */
const POOR_BYTES = 400;

async function withEngine<T>(overrides: Partial<EngineConfig>, body: (engine: Engine) => Promise<T>): Promise<T> {
  const engine = await startEngine(loadAddon(), { ...ENGINE_CONFIG, ...overrides });
  try {
    const result = await body(engine);
    engine.checkInvariant();
    const { numFreeBlocks, numCachedBlocks, numBlocks } = engine.stats();
    assert.equal(numFreeBlocks + numCachedBlocks, numBlocks);
    return result;
  } finally {
    await engine.close();
  }
}

const prompts = await evaluationPrompts();
const requests = makeRequests(prompts, NUM_REQUESTS);
const names = Object.keys(SETUPS);
const totals = { numPreemptions: 0, prefixCacheHits: 0, specNumDraftTokens: 0, specNumAcceptedTokens: 0 };
let alone: Promise<string[]> | null = null;

/** pocket-r1 whose MTP module sees little of the hidden states: many drafts are wrong, and outputs must be the same. */
const poor = new CheckpointCopy(POCKET_R1);
after(() => poor.close());
poor.editTensor('model.safetensors', 'model.layers.6.hnorm.weight', (bytes) => bytes.fill(0, 0, POOR_BYTES));

for (const [round, speculativeTokens] of ([1, 2, 3, 4, 8, 'auto'] as const).entries()) {
  test(`${NUM_REQUESTS} requests: ${speculativeTokens} drafts change no token, log-probability or finish reason`, async () => {
    // One at a time, each with a salt of its own: nothing around it.
    const salted = requests.map((request, index) => ({ ...request, cacheSalt: `alone ${index}` }));
    const expected = await (alone ??= withEngine({}, (engine) => outputsOf(engine, salted, 1)));
    for (const [setup, name] of names.entries()) {
      const chosen = requests.flatMap((_, index) => (index % names.length === setup ? [index] : []));
      const model = (setup + round) % 2 === 0 ? POCKET_R1 : poor.folder;
      await withEngine({ ...SETUPS[name], speculativeTokens, model }, async (engine) => {
        const outputs = await outputsOf(
          engine,
          chosen.map((index) => requests[index]!),
          1 + ((7 * setup + 30) % 32),
        );
        const different = chosen.filter((index, at) => outputs[at] !== expected[index]);
        assert.deepEqual(different, [], `${name}: these requests differ`);
        const stats: EngineStats = engine.stats();
        for (const key of Object.keys(totals) as (keyof typeof totals)[]) totals[key] += stats[key];
      });
    }
  });
}

test('the requests above met preemptions, prefix hits, accepted and rejected drafts', (context) => {
  context.diagnostic(JSON.stringify(totals));
  assert.ok(totals.numPreemptions > 5 && totals.prefixCacheHits > 300);
  assert.ok(totals.specNumAcceptedTokens > 1000);
  assert.ok(totals.specNumDraftTokens > totals.specNumAcceptedTokens + 1000);
});

/** The addon, with the drafts of every step of its runners kept. */
function recordingAddon(): { addon: NativeAddon; drafted: number[] } {
  const addon = loadAddon();
  const drafted: number[] = [];
  const createRunner: NativeAddon['createRunner'] = (options) => {
    const runner = addon.createRunner(options);
    const step: typeof runner.step = async (batch) => {
      const result = await runner.step(batch);
      drafted.push(...result.draftIds);
      return result;
    };
    return { load: () => runner.load(), progress: () => runner.progress(), step, close: () => runner.close() };
  };
  return { addon: { ...addon, createRunner }, drafted };
}

async function idsOf(engine: Engine, request: EngineRequest): Promise<number[]> {
  const ids: number[] = [];
  for await (const { tokens } of engine.submit(request)) ids.push(...tokens.map(({ id }) => id));
  return ids;
}

test('a prefix hit, whole or in part, and chunks of the prompt give the same drafts as a cold run', async () => {
  const prompt = prompts.find(({ length }) => length >= 64)!.slice(0, 64);
  const sampling = { maxTokens: 60, temperature: 0.6, seed: 5n };
  const { addon, drafted } = recordingAddon();
  const draftsOf = async (engine: Engine, cacheSalt: string) => {
    drafted.length = 0;
    const ids = await idsOf(engine, makeRequest('subject', prompt, sampling, { cacheSalt }));
    return [...ids, ...drafted];
  };
  const config = { ...ENGINE_CONFIG, speculativeTokens: 3 };
  const engine = await startEngine(addon, config);
  const cold = await draftsOf(engine, 'cold');
  assert.ok(cold.length > 60);
  for (const length of [64, 50, 33]) {
    const cacheSalt = `hit of ${length}`;
    await idsOf(engine, makeRequest('first', prompt.slice(0, length), { maxTokens: 1 }, { cacheSalt }));
    const { prefixCacheHits } = engine.stats();
    assert.deepEqual(await draftsOf(engine, cacheSalt), cold, cacheSalt);
    assert.ok(engine.stats().prefixCacheHits > prefixCacheHits);
  }
  await engine.close();
  const chunked = await startEngine(addon, { ...config, maxStepTokens: 8, maxNumSeqs: 4 });
  assert.deepEqual(await draftsOf(chunked, ''), cold);
  await chunked.close();
});

test('pocket-r1, greedy: at least 95 % of the drafts that the module was trained for are accepted where those before them are', async (context) => {
  await withEngine({ speculativeTokens: MAX_DRAFTS }, async (engine) => {
    const greedy = prompts
      .slice(0, 40)
      // Room for all drafts, until the answer ends.
      .map((prompt, index) => makeRequest(`r${index}`, prompt, { maxTokens: 400, stopTokenIds: [1] }));
    await outputsOf(engine, greedy, 16);
    const { specNumDrafts, specAcceptedPerPos } = engine.stats();
    context.diagnostic(`${specNumDrafts} rounds, accepted by depth ${specAcceptedPerPos.join(' ')}`);
    assert.ok(specNumDrafts > 100);
    for (const [depth, accepted] of specAcceptedPerPos.entries()) {
      const asked = depth === 0 ? specNumDrafts : specAcceptedPerPos[depth - 1]!;
      const least = depth < TRAINED_DEPTH ? 0.95 : 0.9;
      assert.ok(accepted >= least * asked, `depth ${depth + 1}: ${accepted} of ${asked}`);
    }
  });
});

test('a checkpoint without an MTP layer drafts nothing on auto, and is refused with a number', async () => {
  const model = join(FIXTURES, 'v2-lite-bf16');
  await withEngine({ model, speculativeTokens: 'auto' }, async (engine) => {
    await outputsOf(engine, [makeRequest('r1', [1, 2, 3])], 1);
    assert.equal(engine.stats().specNumDraftTokens, 0);
  });
  const config = { ...ENGINE_CONFIG, model, speculativeTokens: 2 };
  await assert.rejects(
    startEngine(loadAddon(), config),
    /--speculative-tokens is 2 but the checkpoint has no MTP layer/,
  );
});
