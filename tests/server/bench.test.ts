import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { formatOpsReport, runBenchOps } from '../../server/bench/ops.js';
import { runBenchStep } from '../../server/bench/step.js';
import { formatReport } from '../../server/bench/table.js';
import { TrafficModel } from '../../server/bench/traffic.js';
import { readCommandLine, type BenchConfig } from '../../server/config.js';
import type { NativeAddon } from '../../server/engine/addon.js';
import { loadAddon } from '../../server/engine/load-addon.js';
import { readSyntheticModel } from '../../server/model/synthetic.js';
import { FIXTURES, POCKET_R1 } from '../helpers/checkpoint-copy.js';

const CONFIGS = fileURLToPath(new URL('../bench/configs', import.meta.url));

function benchConfig(...flags: string[]): BenchConfig {
  const command = readCommandLine(['bench', 'step', ...flags], {});
  assert.ok(command.kind === 'bench');
  return command.config;
}

test('every config of tests/bench/configs is read, and its slice has one dense layer at most', () => {
  const files = readdirSync(CONFIGS);
  assert.ok(files.length >= 5);
  for (const file of files) {
    const { spec, tensors } = readSyntheticModel(join(CONFIGS, file), 3);
    assert.equal(spec.numHiddenLayers, 3);
    assert.ok(tensors.some(({ name }) => name === 'model.layers.0.mlp.gate_proj.weight'));
    assert.ok(tensors.some(({ name }) => name === 'model.layers.1.mlp.experts.63.down_proj.weight'));
    assert.ok(tensors.every(({ name, file: shard }) => shard === '' && !name.startsWith('model.layers.3.')));
    assert.equal(
      tensors.some(({ dtype }) => dtype === 'F8_E4M3'),
      /fp8|r1/.test(file),
    );
  }
});

test('sizes of published models: R1 has 671 billion weights, Moonlight 16', () => {
  const r1 = readSyntheticModel(join(CONFIGS, 'deepseek-r1.json'), null);
  const moonlight = readSyntheticModel(join(CONFIGS, 'moonlight-16b-a3b.json'), null);
  const count = (tensors: typeof r1.tensors): number =>
    tensors
      .filter(({ name }) => !name.endsWith('_scale_inv'))
      .reduce((sum, { shape }) => sum + shape.reduce((product, size) => product * size, 1), 0);
  assert.equal((count(r1.tensors) / 1e9).toFixed(0), '671');
  assert.equal((count(moonlight.tensors) / 1e9).toFixed(0), '16');
});

test('bytes and flops of a step, by hand', () => {
  const { spec } = readSyntheticModel(join(CONFIGS, 'moonlight-16b-a3b.json'), 2);
  const tensors = [
    { name: 'model.embed_tokens.weight', dtype: 'BF16' as const, shape: [1000, 10], bytes: 20000 },
    { name: 'model.layers.0.mlp.down_proj.weight', dtype: 'F8_E4M3' as const, shape: [10, 20], bytes: 200 },
    { name: 'model.layers.0.mlp.down_proj.weight_scale_inv', dtype: 'F32' as const, shape: [1, 1], bytes: 4 },
    { name: 'model.layers.1.mlp.experts.0.up_proj.weight', dtype: 'BF16' as const, shape: [64, 10], bytes: 1280 },
    { name: 'model.layers.2.mlp.down_proj.weight', dtype: 'BF16' as const, shape: [10, 20], bytes: 400 },
    { name: 'lm_head.weight', dtype: 'BF16' as const, shape: [1000, 10], bytes: 20000 },
  ].map((tensor) => ({ ...tensor, file: '', offset: 0 }));
  const { bytes, flops } = new TrafficModel(spec, tensors, 7).of({ numSequences: 2, numTokens: 1, context: 9 });
  const experts = 1280 * (1 - (58 / 64) ** 2);
  assert.ok(Math.abs(bytes - (204 + 20000 + experts + 2 * 10 * 7)) < 1e-6);
  const products = 2 * (200 + 640 * (6 / 64)) + 2 * 10000;
  const perKey = (2 * 512 + 64) * 16 * 2;
  assert.ok(Math.abs(flops - 2 * (products + 2 * 10 * perKey)) < 1e-6);
});

/** Runs a test with the config.json of a tiny model. */
async function withTinyModel(body: (file: string) => Promise<void> | void): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'rodin-bench-'));
  try {
    const file = join(folder, 'config.json');
    const config = {
      model_type: 'deepseek_v3',
      hidden_act: 'silu',
      vocab_size: 300,
      hidden_size: 128,
      intermediate_size: 192,
      moe_intermediate_size: 64,
      num_hidden_layers: 3,
      num_attention_heads: 2,
      n_shared_experts: 1,
      n_routed_experts: 8,
      num_experts_per_tok: 2,
      n_group: 1,
      topk_group: 1,
      norm_topk_prob: true,
      routed_scaling_factor: 2.5,
      first_k_dense_replace: 1,
      kv_lora_rank: 64,
      qk_nope_head_dim: 32,
      qk_rope_head_dim: 16,
      v_head_dim: 32,
      max_position_embeddings: 512,
      rope_theta: 10000,
      quantization_config: { quant_method: 'fp8', weight_block_size: [128, 128] },
    };
    writeFileSync(file, JSON.stringify(config));
    await body(file);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

test('synthetic weights run: a tiny model is timed, its figures agree with one another', () =>
  withTinyModel(async (file) => {
    const flags = ['--model', file, '--weights', 'synthetic', '--device', 'cpu', '--threads', '1'];
    const report = await runBenchStep(benchConfig(...flags, '--batch', '1,3', '--context', '100', '--prompt', '50'));
    assert.deepEqual(
      report.cases.map(({ kind, numSequences, numTokens }) => [kind, numSequences, numTokens]),
      [
        ['decode', 1, 1],
        ['decode', 3, 1],
        ['prefill', 1, 50],
      ],
    );
    assert.ok(report.ceilings.readBytesPerSecond > 1e8 && report.ceilings.flopsPerSecond > 1e9);
    for (const one of report.cases) {
      assert.ok(one.numSteps >= 5 && one.minMs > 0 && one.medianMs >= one.minMs && one.p90Ms >= one.medianMs);
      const tokens = one.numSequences * one.numTokens;
      assert.ok(Math.abs(one.tokensPerSecond * one.medianMs - 1000 * tokens) < 1e-6 * tokens * 1000);
      const share = one.bytesPerSecond / report.ceilings.readBytesPerSecond;
      assert.ok(Math.abs(one.bandwidthShare! - share) < 1e-9);
    }
    for (const { isAhead, deviceMs, idleMs, medianMs } of report.cases) {
      assert.ok(!isAhead && idleMs > 0 && deviceMs > 0.5 * medianMs && deviceMs <= medianMs);
    }
    assert.match(formatReport(report), /decode 3 @ 100 .*\n *prefill 50 /);
  }));

test('a GPU is given the next decode before the last is over, and then one by one', () =>
  withTinyModel(async (file) => {
    const real = loadAddon();
    const numUnderWay: number[] = [];
    let count = 0;
    const addon: NativeAddon = {
      ...real,
      devices: () => ({ usable: ['cuda:0', 'cpu'], unusable: [] }),
      cacheBytesPerToken: (options) => real.cacheBytesPerToken({ ...options, device: 'cpu' }),
      ceilings: () => ({ readBytesPerSecond: 0, flopsPerSecond: 0 }),
      createRunner: (options) => {
        const runner = real.createRunner({ ...options, device: 'cpu' });
        return {
          load: () => runner.load(),
          progress: () => runner.progress(),
          close: () => runner.close(),
          step: (batch) => {
            numUnderWay.push(++count);
            return runner.step(batch).finally(() => count--);
          },
        };
      },
    };
    const flags = ['--model', file, '--weights', 'synthetic', '--device', 'cuda:0', '--threads', '1', '--prompt', '0'];
    const report = await runBenchStep(benchConfig(...flags, '--batch', '2', '--context', '9'), () => {}, addon);
    assert.deepEqual(
      report.cases.map(({ isAhead }) => isAhead),
      [true, false],
    );
    assert.match(formatReport(report), /decode 2 @ 9, ahead .*\ndecode 2 @ 9 /);
    const half = numUnderWay.length / 2;
    assert.deepEqual(new Set(numUnderWay.slice(1, half - 1)), new Set([2]));
    assert.deepEqual(new Set(numUnderWay.slice(half + 1)), new Set([1]));
  }));

test('every op of a model is timed and agrees with the oracle', () =>
  withTinyModel((file) => {
    const command = readCommandLine(
      [
        'bench',
        'ops',
        '--model',
        file,
        '--device',
        'cpu',
        '--threads',
        '1',
        '--batch',
        '1,5',
        '--context',
        '100',
        '--prompt',
        '40',
      ],
      {},
    );
    assert.ok(command.kind === 'bench' && command.what === 'ops');
    const report = runBenchOps(command.config);
    const names = (numTokens: number): string[] =>
      report.cases.filter((one) => one.numTokens === numTokens).map(({ name }) => name);
    const always = ['add_rms_norm 128', 'q_proj 96x128 fp8', 'kv_a_proj_with_mqa 80x128 fp8', 'o_proj 128x64 fp8'];
    const moe = 'moe 8 of 64x128 fp8';
    assert.deepEqual(names(5), [...always, 'lm_head 300x128 bf16', moe, 'attention 2 heads @ 100']);
    assert.deepEqual(names(40), [...always, moe]);
    for (const one of report.cases) {
      assert.equal(one.skipped, null);
      assert.ok(one.minMicros! > 0 && one.medianMicros! >= one.minMicros!, one.name);
      // inputs and, on some paths, results are rounded to bf16
      assert.ok(one.relativeError! < 1e-2, `${one.name}: ${one.relativeError}`);
      assert.ok(Math.abs(one.bytesPerSecond! * one.medianMicros! - 1e6 * one.bytes) < one.bytes);
    }
    assert.match(formatOpsReport(report), /moe 8 of 64x128 fp8 +5 /);
  }));

test('ops are refused where they mean nothing', () => {
  const refused = (pattern: RegExp, ...flags: string[]): void => {
    const command = readCommandLine(['bench', 'ops', '--device', 'cpu', ...flags], {});
    assert.ok(command.kind === 'bench');
    assert.throws(() => runBenchOps(command.config), { name: 'StartupError', message: pattern });
  };
  refused(/--layers belongs to `rodin bench step`/, '--model', POCKET_R1, '--layers', '2');
  refused(/takes models with multi-head latent attention; .* of type llama/, '--model', join(FIXTURES, 'llama-bf16'));
});

test('what cannot be measured is refused with a sentence', async () => {
  const refused = (pattern: RegExp, ...flags: string[]): Promise<void> =>
    assert.rejects(runBenchStep(benchConfig('--device', 'cpu', ...flags)), { name: 'StartupError', message: pattern });
  const r1 = join(CONFIGS, 'deepseek-r1.json');
  await refused(/has no weights; give --weights synthetic/, '--model', r1);
  await refused(/--layers takes a slice of synthetic weights/, '--model', POCKET_R1, '--layers', '2');
  await refused(/has only 61 layers/, '--model', r1, '--weights', 'synthetic', '--layers', '62');
  await refused(/reach position 5001; the model has 4096/, '--model', POCKET_R1, '--context', '5000');
  assert.throws(() => readCommandLine(['bench', 'serve'], {}), /write 'rodin bench step' or 'rodin bench ops'/);
  assert.throws(() => benchConfig('--batch', '1,x'), /--batch must be a whole number/);
});
