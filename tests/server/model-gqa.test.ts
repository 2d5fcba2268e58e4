/** Reading llama and qwen2 folders: what config.json means there, and what of it is refused. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { test } from 'node:test';
import { StartupError } from '../../server/errors.js';
import { readCheckpoint } from '../../server/model/checkpoint.js';
import type { Checkpoint } from '../../server/model/spec.js';
import { CheckpointCopy, FIXTURES, type Header } from '../helpers/checkpoint-copy.js';

type Config = Record<string, unknown>;

const LLAMA3 = {
  rope_type: 'llama3',
  factor: 8,
  low_freq_factor: 1,
  high_freq_factor: 4,
  original_max_position_embeddings: 64,
};
const YARN = { type: 'yarn', factor: 4, original_max_position_embeddings: 64 };

/** Reads a copy of a fixture with some keys of config.json changed (undefined: removed). */
function readWith(source: string, changes: Config, editHeader: (header: Header) => void = () => {}): Checkpoint {
  const copy = new CheckpointCopy(join(FIXTURES, source));
  try {
    copy.editJson('config.json', (config) => void Object.assign(config, changes));
    if (source.startsWith('odd-')) copy.editHeader('model.safetensors', editHeader);
    return readCheckpoint(copy.folder);
  } finally {
    copy.close();
  }
}

function namesOf({ tensors }: Checkpoint, suffix: string): string[] {
  return tensors.map(({ name }) => name).filter((name) => name.endsWith(suffix));
}

test('llama-bf16: spec and tensors', () => {
  const checkpoint = readCheckpoint(join(FIXTURES, 'llama-bf16'));
  assert.deepEqual(checkpoint.spec, {
    modelType: 'llama',
    vocabSize: 512,
    hiddenSize: 192,
    intermediateSize: 448,
    moeIntermediateSize: 0,
    numHiddenLayers: 3,
    numAttentionHeads: 6,
    numSharedExperts: 0,
    numRoutedExperts: 0,
    numExpertsPerToken: 0,
    numExpertGroups: 1,
    topkGroups: 1,
    topkMethod: 'greedy',
    scoringFunc: 'softmax',
    normTopkProb: false,
    routedScalingFactor: 1,
    firstKDenseReplace: 0,
    moeLayerFreq: 1,
    kvLoraRank: 0,
    qLoraRank: 0,
    qkNopeHeadDim: 0,
    qkRopeHeadDim: 0,
    vHeadDim: 0,
    numKeyValueHeads: 2,
    headDim: 32,
    attentionBias: false,
    mlpBias: false,
    maxPositionEmbeddings: 2048,
    rmsNormEps: 1e-6,
    ropeTheta: 500000,
    ropeInterleave: false,
    yarn: null,
    llama3: { factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalMaxPositionEmbeddings: 64 },
    ropeLinearFactor: 1,
    tieWordEmbeddings: false,
    numMtpLayers: 0,
    weightBlockSize: null,
  });
  assert.deepEqual(checkpoint.notes, []);
  assert.equal(checkpoint.tensors.length, 3 * 9 + 3);
  const shapeOf = (name: string) => checkpoint.tensors.find((tensor) => tensor.name === name)!.shape;
  assert.deepEqual(shapeOf('model.layers.2.self_attn.q_proj.weight'), [192, 192]);
  assert.deepEqual(shapeOf('model.layers.2.self_attn.v_proj.weight'), [64, 192]);
  assert.deepEqual(checkpoint.defaults.eosTokenIds, [1]);
});

test('qwen2-bf16: biases of q, k and v, which its config.json does not mention', () => {
  const checkpoint = readCheckpoint(join(FIXTURES, 'qwen2-bf16'));
  assert.ok(checkpoint.spec.attentionBias && !checkpoint.spec.mlpBias);
  assert.deepEqual(
    namesOf(checkpoint, '.bias').slice(0, 3),
    ['q', 'k', 'v'].map((name) => `model.layers.0.self_attn.${name}_proj.bias`),
  );
  assert.equal(namesOf(checkpoint, '.bias').length, 3 * 3);
  assert.deepEqual(checkpoint.notes, []);
});

test('the odd ones: biases everywhere, tied embeddings, head_dim as given, one kv head, FP8, linear, YaRN', () => {
  const bias = readCheckpoint(join(FIXTURES, 'odd-llama-bias'));
  const { headDim, numKeyValueHeads, ropeLinearFactor, tieWordEmbeddings } = bias.spec;
  assert.deepEqual([headDim, numKeyValueHeads, ropeLinearFactor, tieWordEmbeddings], [24, 1, 4, true]);
  assert.equal(namesOf(bias, '.bias').length, 2 * 7);
  assert.equal(namesOf(bias, 'lm_head.weight').length, 0);
  const fp8 = readCheckpoint(join(FIXTURES, 'odd-llama-fp8'));
  assert.deepEqual(fp8.spec.weightBlockSize, [128, 128]);
  assert.equal(namesOf(fp8, '_scale_inv').length, 2 * 7);
  const yarn = readCheckpoint(join(FIXTURES, 'odd-qwen2-yarn'));
  assert.deepEqual(yarn.spec.yarn, {
    factor: 4,
    betaFast: 32,
    betaSlow: 1,
    mscale: 1,
    mscaleAllDim: 0,
    originalMaxPositionEmbeddings: 64,
  });
});

test('as many kv heads as heads where a llama leaves them out; null means so in a qwen2 too', () => {
  const { spec } = readWith('odd-llama-fp8', { num_key_value_heads: undefined });
  assert.equal(spec.numKeyValueHeads, 5);
  assert.throws(() => readWith('qwen2-bf16', { num_key_value_heads: null }), /k_proj.*\[64, 192\].*\[192, 192\]/);
});

test("Transformers 5's rope_parameters mean the same", () => {
  const rope_parameters = { ...LLAMA3, rope_theta: 500000 };
  const changes = { rope_scaling: undefined, rope_theta: undefined, rope_parameters };
  assert.deepEqual(readWith('llama-bf16', changes).spec, readCheckpoint(join(FIXTURES, 'llama-bf16')).spec);
  const plain = readWith('llama-bf16', { rope_scaling: { rope_type: 'default' } });
  assert.deepEqual([plain.spec.llama3, plain.spec.ropeTheta], [null, 500000]);
});

test('keys that say what is so anyway are accepted', () => {
  const changes = {
    use_sliding_window: false,
    sliding_window: 4096,
    max_window_layers: 21,
    use_mrope: false,
    layer_types: ['full_attention', 'full_attention', 'full_attention'],
    partial_rotary_factor: 1,
    mlp_bias: false,
  };
  const plain = readCheckpoint(join(FIXTURES, 'qwen2-bf16')).spec;
  assert.deepEqual(readWith('qwen2-bf16', changes).spec, plain);
});

const REFUSED: [source: string, changes: Config, sentence: RegExp][] = [
  [
    'qwen2-bf16',
    { use_sliding_window: true },
    /"use_sliding_window" is true, which is not supported; supported: false/,
  ],
  ['qwen2-bf16', { use_mrope: true }, /"use_mrope" is true/],
  ['qwen2-bf16', { layer_types: ['full_attention', 'sliding_attention', 'full_attention'] }, /"layer_types" is \[/],
  ['qwen2-bf16', { attention_bias: false }, /"attention_bias" is false.*leaving it out/],
  ['qwen2-bf16', { mlp_bias: true }, /"mlp_bias" is true/],
  ['qwen2-bf16', { num_key_value_heads: undefined }, /"num_key_value_heads" is absent/],
  ['qwen2-bf16', { architectures: ['Qwen2ForSequenceClassification'] }, /"architectures".*Qwen2ForCausalLM/],
  ['qwen2-bf16', { rope_scaling: { ...YARN, mscale: 0.7 } }, /"rope_scaling.mscale" is 0.7.*leaving it out/],
  ['qwen2-bf16', { rope_scaling: { ...YARN, attention_factor: 2 } }, /"rope_scaling.attention_factor" is 2/],
  ['qwen2-bf16', { rope_scaling: { type: 'yarn', factor: 4 } }, /original_max_position_embeddings" is absent/],
  ['qwen2-bf16', { rope_scaling: { type: 'mrope', mrope_section: [1] } }, /"rope_scaling.type" is "mrope".*llama3/],
  ['llama-bf16', { partial_rotary_factor: 0.5 }, /"partial_rotary_factor" is 0.5/],
  ['llama-bf16', { num_key_value_heads: 4 }, /"num_key_value_heads" is 4; it must be a divisor of num_att.*\(6\)/],
  ['llama-bf16', { num_attention_heads: 5, num_key_value_heads: 1 }, /"head_dim" is absent; it must be given/],
  ['llama-bf16', { head_dim: 31 }, /"head_dim" is 31; it must be even/],
  ['llama-bf16', { head_dim: 64 }, /q_proj.*\[192, 192\].*\[384, 192\]/],
  ['llama-bf16', { attention_bias: true }, /q_proj\.bias" \[192\], which no shard holds/],
  ['llama-bf16', { mlp_bias: true }, /gate_proj\.bias" \[448\], which no shard holds/],
  ['llama-bf16', { rope_scaling: { ...LLAMA3, high_freq_factor: 1 } }, /high_freq_factor" is 1; it must be above/],
  ['llama-bf16', { rope_scaling: { ...LLAMA3, low_freq_factor: null } }, /low_freq_factor" is absent/],
  ['llama-bf16', { rope_scaling: { ...LLAMA3, beta_fast: 32 } }, /"rope_scaling.beta_fast" is 32/],
  ['llama-bf16', { rope_scaling: { type: 'linear' } }, /"rope_scaling.factor" is absent/],
  ['llama-bf16', { rope_scaling: { type: 'dynamic', factor: 2 } }, /"rope_scaling.type" is "dynamic".*"linear"/],
  ['llama-bf16', { hidden_act: 'gelu' }, /"hidden_act" is "gelu"/],
];

for (const [source, changes, sentence] of REFUSED) {
  test(`refused: ${source} with ${JSON.stringify(changes)}`, () => {
    assert.throws(
      () => readWith(source, changes),
      (error) => {
        assert.ok(error instanceof StartupError, String(error));
        assert.match(error.message, sentence);
        assert.match(error.message, /config\.json/);
        return true;
      },
    );
  });
}

test('a missing bias and one of a wrong shape are refused by name', () => {
  const name = 'model.layers.1.self_attn.k_proj.bias';
  assert.throws(
    () => readWith('odd-qwen2-yarn', {}, (header) => void delete header[name]),
    /model\.layers\.1\.self_attn\.k_proj\.bias" \[54\], which no shard holds/,
  );
  assert.throws(
    () => readWith('odd-qwen2-yarn', {}, (header) => void (header[name]!.shape = [2, 27])),
    /k_proj\.bias.*\[54\]/,
  );
});
