import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { loadAddon } from '../../server/engine/load-addon.js';
import { runLogits, type LogitsOptions } from '../../server/logits.js';
import { readCheckpoint } from '../../server/model/checkpoint.js';
import { CheckpointCopy, FIXTURES, POCKET_R1 } from '../helpers/checkpoint-copy.js';
import { IS_GPU, TEST_DEVICE, cpuPaths } from '../helpers/device.js';
import { Reference, maxDifference, meanKl } from '../helpers/reference.js';

interface OutputLine {
  ids: number[];
  logits: number[][];
  draft_logits?: number[][];
}

/** Runs the tool on prompts, through its files. */
async function logitsOf(
  prompts: number[][],
  options: Partial<LogitsOptions> & { model: string },
): Promise<OutputLine[]> {
  const folder = mkdtempSync(join(tmpdir(), 'rodin-logits-'));
  try {
    const files = { prompts: join(folder, 'in.jsonl'), out: join(folder, 'out.jsonl') };
    writeFileSync(files.prompts, prompts.map((ids) => `${JSON.stringify({ ids })}\n`).join(''));
    const defaults = {
      device: TEST_DEVICE,
      compute: 'auto' as const,
      threads: null,
      last: 16,
      draft: false,
      deterministic: false,
    };
    const numPrompts = await runLogits({ ...defaults, ...files, ...options });
    assert.equal(numPrompts, prompts.length);
    return readFileSync(files.out, 'utf8')
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line) as OutputLine);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** What Transformers gets in bf16; twice that is allowed. The odd ones have no such figure and take the smallest. */
const MEAN_KL: Record<string, number> = {
  'v2-lite-bf16': 7.6e-3,
  'v3-fp8-mtp': 5.5e-2,
  'llama-bf16': 1.3e-3,
  'qwen2-bf16': 1.7e-3,
};
/** float32 and grouped-query attention are the CPU's alone. */
const ON_CPU_ALONE = ['llama-bf16', 'qwen2-bf16', 'odd-llama-bias', 'odd-llama-fp8', 'odd-qwen2-yarn'];
const CHECKPOINTS = [
  'v2-lite-bf16',
  'v3-fp8-mtp',
  'odd-fp8',
  'odd-f16-tied',
  'odd-v2-group',
  ...(IS_GPU ? [] : ON_CPU_ALONE),
];

for (const name of CHECKPOINTS) {
  const model = join(FIXTURES, name);
  const reference = new Reference(model);
  const prompts = reference.prompts();
  const draft = reference.has('draft_logits.1');

  // 40 tokens a step chunk every longer prompt, with the one-token overlap that the MTP module needs.
  for (const maxStepTokens of IS_GPU ? [] : [512, 40]) {
    test(`${name}: float32 logits in steps of ${maxStepTokens} tokens`, async () => {
      const lines = await logitsOf(prompts, { model, compute: 'float32', draft, maxStepTokens });
      for (const [index, line] of lines.entries()) {
        assert.deepEqual(line.ids, prompts[index]);
        assert.equal(line.logits.length, Math.min(16, line.ids.length));
        const difference = maxDifference(line.logits, reference.rows(`logits.${index}`));
        assert.ok(difference <= 5e-3, `prompt ${index}: largest difference ${difference}`);
        if (!draft) continue;
        assert.equal(line.draft_logits!.length, Math.min(16, line.ids.length - 1));
        if (line.ids.length === 1) continue;
        const draftDifference = maxDifference(line.draft_logits!, reference.rows(`draft_logits.${index}`));
        assert.ok(draftDifference <= 5e-3, `prompt ${index}: largest difference of draft logits ${draftDifference}`);
      }
    });
  }

  const limit = MEAN_KL[name] ?? (IS_GPU && name === 'odd-fp8' ? 7.6e-3 : 1.3e-3);
  for (const cpuPath of cpuPaths()) {
    test(`${name}: mean KL on ${TEST_DEVICE}, path ${cpuPath}`, async (context) => {
      // A GPU quantises the inputs of long prompts otherwise: native tests compare that with a reference of its own.
      const lines = await logitsOf(prompts, { model, cpuPath, deterministic: IS_GPU });
      const expected = prompts.flatMap((_, index) => reference.rows(`logits.${index}`));
      const kl = meanKl(
        lines.flatMap((line) => line.logits),
        expected,
      );
      context.diagnostic(`mean KL ${kl.toExponential(2)}, allowed ${(2 * limit).toExponential(2)}`);
      assert.ok(kl <= 2 * limit, `mean KL ${kl}`);
    });
  }
}

test('a missing MTP module, bad prompts and files are refused with file and line', async () => {
  const v2 = join(FIXTURES, 'v2-lite-bf16');
  await assert.rejects(logitsOf([[1]], { model: v2, draft: true }), { name: 'StartupError', message: /no MTP module/ });
  for (const [ids, sentence] of [
    [[512], /line 2: 512 is no token id/],
    [[-1], /line 2: -1/],
    [[1.5], /line 2: 1.5/],
    [[null], /line 2: null/],
    [['1'], /line 2: "1"/],
    [[], /line 2: "ids" must be a list of at least one/],
    [new Array(2561).fill(1), /line 2: "ids" has 2561 tokens; the model has 2560/],
  ] as [never[], RegExp][]) {
    await assert.rejects(logitsOf([[1], ids], { model: v2 }), { name: 'StartupError', message: sentence });
  }
  await assert.rejects(logitsOf([[1]], { model: v2, prompts: '/nowhere/in.jsonl' }), { message: /cannot be read/ });
  await assert.rejects(logitsOf([[1]], { model: v2, out: '/nowhere/out.jsonl' }), { message: /cannot be written/ });
});

test('a checkpoint needs no tokenizer for this', async () => {
  const copy = new CheckpointCopy(POCKET_R1);
  try {
    copy.remove('tokenizer.json');
    copy.remove('tokenizer_config.json');
    const [line] = await logitsOf([[0, 3, 5]], { model: copy.folder, last: 1 });
    assert.equal(line!.logits.length, 1);
    assert.equal(line!.logits[0]!.length, readCheckpoint(copy.folder).spec.vocabSize);
  } finally {
    copy.close();
  }
});

test('a device that is not there, or cannot run a compute mode, is refused', async () => {
  const { usable, unusable } = loadAddon().devices();
  if (usable.includes('cuda:0')) {
    await assert.rejects(logitsOf([[1]], { model: POCKET_R1, device: 'cuda:0', compute: 'float32' }), {
      message: /--compute float32 runs on the CPU alone/,
    });
  } else {
    await assert.rejects(logitsOf([[1]], { model: POCKET_R1, device: 'cuda:0' }), (error: Error) =>
      error.message.includes(unusable.find(({ device }) => device === 'cuda:0')!.reason),
    );
  }
  const [line] = await logitsOf([[1]], { model: join(FIXTURES, 'llama-bf16'), device: 'auto', last: 1 });
  assert.equal(line!.logits.length, 1);
});
