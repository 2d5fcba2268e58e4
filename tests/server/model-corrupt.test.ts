import assert from 'node:assert/strict';
import { join } from 'node:path';
import { test } from 'node:test';
import fc from 'fast-check';
import { StartupError } from '../../server/errors.js';
import { readCheckpoint } from '../../server/model/checkpoint.js';
import { readSafetensorsHeader } from '../../server/model/safetensors.js';
import { CheckpointCopy, FIXTURES } from '../helpers/checkpoint-copy.js';

const SHARDS = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'] as const;
const INDEX = 'model.safetensors.index.json';
const DOWN = 'model.layers.0.mlp.down_proj.weight';

/** name -> [source, damage, what the one sentence must say] */
const CASES: Record<string, [source: string, damage: (copy: CheckpointCopy) => void, sentence: RegExp[]]> = {
  'no folder': ['v3-fp8-mtp', (copy) => copy.close(), [/is no folder/]],
  'no config.json': ['v3-fp8-mtp', (copy) => copy.remove('config.json'), [/config\.json is missing/]],
  'config.json is no JSON': [
    'v3-fp8-mtp',
    (copy) => copy.editBytes('config.json', (bytes) => bytes.subarray(0, 100)),
    [/config\.json is not valid JSON/],
  ],
  'a key twice in config.json': [
    'v3-fp8-mtp',
    (copy) => copy.editBytes('config.json', (bytes) => Buffer.from(bytes.toString().replace('{', '{"n_group": 1,'))),
    [/config\.json/, /"n_group" twice/],
  ],
  'a missing shard': ['v3-fp8-mtp', (copy) => copy.remove(SHARDS[1]), [new RegExp(SHARDS[1]), /missing/, /"model\./]],
  'a truncated shard': [
    'v3-fp8-mtp',
    (copy) => copy.editBytes(SHARDS[0], (bytes) => bytes.subarray(0, bytes.length - 1)),
    [new RegExp(SHARDS[0]), /truncated/, /tensor "model\./],
  ],
  'a shard truncated in its header': [
    'v3-fp8-mtp',
    (copy) => copy.editBytes(SHARDS[0], (bytes) => bytes.subarray(0, 500)),
    [new RegExp(SHARDS[0]), /truncated/],
  ],
  'an empty shard': ['v3-fp8-mtp', (copy) => copy.editBytes(SHARDS[0], () => Buffer.alloc(0)), [/too few/]],
  'bytes behind the last tensor': [
    'v3-fp8-mtp',
    (copy) => copy.editBytes(SHARDS[0], (bytes) => Buffer.concat([bytes, Buffer.alloc(4)])),
    [new RegExp(SHARDS[0]), /4 bytes after its last tensor/],
  ],
  'a header of 2^63 bytes': [
    'v3-fp8-mtp',
    (copy) =>
      copy.editBytes(SHARDS[0], (bytes) => {
        bytes.writeBigUInt64LE(2n ** 63n, 0);
        return bytes;
      }),
    [/no safetensors file/, /100000000/],
  ],
  'a header of 100 MB + 1': [
    'v3-fp8-mtp',
    (copy) =>
      copy.editBytes(SHARDS[0], (bytes) => {
        bytes.writeBigUInt64LE(100_000_001n, 0);
        return bytes;
      }),
    [/at most 100000000/],
  ],
  'overlapping offsets': [
    'v3-fp8-mtp',
    (copy) =>
      copy.editHeader(SHARDS[0], (header) => {
        const [first, second] = Object.keys(header).filter((name) => name.endsWith('down_proj.weight'));
        header[second!]!.data_offsets = header[first!]!.data_offsets.map((offset) => offset + 1);
        header[second!]!.shape = header[first!]!.shape;
      }),
    [new RegExp(SHARDS[0]), /overlap/, /down_proj/],
  ],
  'a tensor twice in one header': [
    'v3-fp8-mtp',
    (copy) => copy.editHeaderText(SHARDS[0], (text) => text.replace('{', `{"lm_head.weight":{"dtype":"BF16"},`)),
    [new RegExp(SHARDS[0]), /"lm_head\.weight" twice/],
  ],
  'a tensor twice, once with an escape': [
    'v3-fp8-mtp',
    (copy) => copy.editHeaderText(SHARDS[0], (text) => text.replace('{', `{"lm_head\\u002eweight":{"dtype":"BF16"},`)),
    [/"lm_head\.weight" twice/],
  ],
  'a tensor in both shards': [
    'v3-fp8-mtp',
    (copy) =>
      copy.editHeader(SHARDS[1], (header) => {
        const donor = Object.keys(header).find((name) => name.endsWith('input_layernorm.weight'))!;
        header['model.layers.0.input_layernorm.weight'] = { ...header[donor]!, data_offsets: [0, 0], shape: [0] };
      }),
    [/lies in both/, /model\.layers\.0\.input_layernorm\.weight/],
  ],
  'a wrong shape': [
    'v3-fp8-mtp',
    (copy) =>
      copy.editHeader(SHARDS[0], (header) => {
        header[DOWN]!.shape.reverse();
      }),
    [new RegExp(SHARDS[0]), new RegExp(DOWN), /\[512, 256\]/, /\[256, 512\]/],
  ],
  'a shape that does not fill its bytes': [
    'v3-fp8-mtp',
    (copy) => copy.editHeader(SHARDS[0], (header) => void (header[DOWN]!.shape[0]! -= 1)),
    [new RegExp(DOWN), /needs 130560 bytes but has 131072/],
  ],
  'a shape whose product overflows': [
    'v3-fp8-mtp',
    (copy) =>
      copy.editHeader(SHARDS[0], (header) => {
        header[DOWN]!.shape = [2 ** 40, 2 ** 40, 0];
        header[DOWN]!.data_offsets = [0, 0];
      }),
    [new RegExp(DOWN), /overflows/],
  ],
  'offsets that go backwards': [
    'v3-fp8-mtp',
    (copy) => copy.editHeader(SHARDS[0], (header) => void header[DOWN]!.data_offsets.reverse()),
    [new RegExp(DOWN), /end before they begin/],
  ],
  'a negative offset': [
    'v3-fp8-mtp',
    (copy) => copy.editHeader(SHARDS[0], (header) => void (header[DOWN]!.data_offsets[0] = -8)),
    [new RegExp(DOWN), /invalid data_offsets/],
  ],
  'an unknown dtype': [
    'v3-fp8-mtp',
    (copy) => copy.editHeader(SHARDS[0], (header) => void (header[DOWN]!.dtype = 'F7')),
    [new RegExp(DOWN), /unknown dtype "F7"/],
  ],
  'a dtype that is not supported': [
    'v3-fp8-mtp',
    (copy) => copy.editHeader(SHARDS[0], (header) => void (header[DOWN]!.dtype = 'F8_E5M2')),
    [new RegExp(DOWN), /F8_E5M2, which is not supported/, /BF16/],
  ],
  'FP8 where no FP8 may be': [
    'v3-fp8-mtp',
    (copy) =>
      copy.editHeader(SHARDS[0], (header) => {
        const norm = header['model.layers.0.input_layernorm.weight']!;
        norm.dtype = 'F8_E4M3';
        norm.data_offsets[1] = norm.data_offsets[0]! + 256;
      }),
    [/input_layernorm\.weight/, /F8_E4M3, which is not supported there/],
  ],
  'missing scales': [
    'v3-fp8-mtp',
    (copy) => {
      copy.editHeader(SHARDS[0], (header) => void delete header[`${DOWN}_scale_inv`]);
      copy.editJson(INDEX, (index) => void delete (index['weight_map'] as Record<string, string>)[`${DOWN}_scale_inv`]);
    },
    [new RegExp(`"${DOWN}"`), new RegExp(`"${DOWN}_scale_inv" are missing`)],
  ],
  'scales of a wrong shape': [
    'v3-fp8-mtp',
    (copy) => copy.editHeader(SHARDS[0], (header) => void header[`${DOWN}_scale_inv`]!.shape.reverse()),
    [new RegExp(`${DOWN}_scale_inv`), /\[4, 2\]/, /\[2, 4\]/],
  ],
  'scales of a wrong dtype': [
    'v3-fp8-mtp',
    (copy) => copy.editHeader(SHARDS[0], (header) => void (header[`${DOWN}_scale_inv`]!.dtype = 'I32')),
    [new RegExp(`${DOWN}_scale_inv`), /I32/],
  ],
  'FP8 without a quantization_config': [
    'v3-fp8-mtp',
    (copy) => copy.editJson('config.json', (config) => void delete config['quantization_config']),
    [/F8_E4M3/, /quantization_config/],
  ],
  'a tensor that no shard holds': [
    'v2-lite-bf16',
    (copy) => {
      copy.editHeader(SHARDS[1], (header) => void delete header['model.norm.weight']);
      copy.editBytes(SHARDS[1], (bytes) => bytes.subarray(0, bytes.length - 256));
      copy.editJson(INDEX, (index) => void delete (index['weight_map'] as Record<string, string>)['model.norm.weight']);
    },
    [/"model\.norm\.weight" \[128\], which no shard holds/],
  ],
  'an index that names the wrong shard': [
    'v2-lite-bf16',
    (copy) =>
      copy.editJson(INDEX, (index) => {
        (index['weight_map'] as Record<string, string>)['model.norm.weight'] = SHARDS[0];
      }),
    [new RegExp(SHARDS[0]), /does not hold tensor "model\.norm\.weight"/],
  ],
  'an index that leaves the folder': [
    'v2-lite-bf16',
    (copy) =>
      copy.editJson(INDEX, (index) => {
        (index['weight_map'] as Record<string, string>)['model.norm.weight'] = '../../etc/passwd';
      }),
    [/model\.norm\.weight/, /same folder/],
  ],
  'no index': ['v2-lite-bf16', (copy) => copy.remove(INDEX), [/index\.json is missing/]],
  'part of the MTP module': [
    'v3-fp8-mtp',
    (copy) => {
      const name = 'model.layers.3.eh_proj.weight';
      const shard = SHARDS[1];
      copy.editHeader(shard, (header) => void delete header[name]);
      copy.editJson(INDEX, (index) => void delete (index['weight_map'] as Record<string, string>)[name]);
    },
    [/model\.layers\.3\.eh_proj\.weight/, /no shard holds/],
  ],
  ...Object.fromEntries(
    (
      [
        ['model_type', 'qwen3', /"model_type" is "qwen3".*deepseek_v3.*qwen2/],
        ['model_type', undefined, /"model_type" is absent/],
        ['architectures', ['DeepseekV3ForSequenceClassification'], /"architectures".*DeepseekV3ForCausalLM/],
        ['hidden_act', 'gelu', /"hidden_act" is "gelu".*"silu"/],
        ['topk_method', 'random', /"topk_method" is "random".*noaux_tc/],
        ['scoring_func', 'relu', /"scoring_func" is "relu".*sigmoid/],
        ['rope_scaling', { type: 'linear', factor: 2 }, /"rope_scaling\.type" is "linear".*yarn/],
        ['rope_scaling', { type: 'dynamic', factor: 2 }, /"rope_scaling\.type" is "dynamic".*yarn/],
        ['rope_scaling', { type: 'yarn', factor: 2 }, /original_max_position_embeddings" is absent/],
        ['rope_scaling', { rope_type: 'yarn', factor: 2, attention_factor: 3 }, /attention_factor.*not supported/],
        ['rope_parameters', { rope_type: 'longrope' }, /"rope_parameters\.rope_type" is "longrope"/],
        ['quantization_config', { quant_method: 'awq' }, /quant_method" is "awq".*"fp8"/],
        ['quantization_config', { quant_method: 'fp8', fmt: 'e5m2' }, /fmt" is "e5m2".*"e4m3"/],
        ['quantization_config', { quant_method: 'fp8' }, /weight_block_size" is absent.*\[128,128\]/],
        [
          'quantization_config',
          { quant_method: 'fp8', activation_scheme: 'static', weight_block_size: [128, 128] },
          /activation_scheme" is "static".*"dynamic"/,
        ],
        ['hidden_size', '256', /"hidden_size" is "256"; it must be a whole number/],
        ['hidden_size', 0, /"hidden_size" is 0/],
        ['num_hidden_layers', 2.5, /"num_hidden_layers" is 2.5/],
        ['kv_lora_rank', undefined, /"kv_lora_rank" is absent/],
        ['n_group', 3, /"n_group" is 3; it must be a divisor/],
        ['topk_group', 5, /"topk_group" is 5/],
        ['num_experts_per_tok', 9, /"num_experts_per_tok" is 9/],
        ['qk_rope_head_dim', 63, /"qk_rope_head_dim" is 63; it must be even/],
        ['eos_token_id', 512, /"eos_token_id" is 512; token ids/],
        ['bos_token_id', -1, /"bos_token_id" is -1/],
        ['vocab_size', 511, /embed_tokens.*\[512, 256\].*\[511, 256\]|bos|eos/],
      ] as [string, unknown, RegExp][]
    ).map(([key, value, sentence]) => [
      `config.json with ${key} ${JSON.stringify(value)}`,
      [
        'v3-fp8-mtp',
        (copy: CheckpointCopy) => copy.editJson('config.json', (config) => void (config[key] = value)),
        [/config\.json/, sentence],
      ],
    ]),
  ),
};

for (const [name, [source, damage, sentences]] of Object.entries(CASES)) {
  test(`refused: ${name}`, () => {
    const copy = new CheckpointCopy(join(FIXTURES, source));
    try {
      damage(copy);
      assert.throws(
        () => readCheckpoint(copy.folder),
        (error) => {
          assert.ok(error instanceof StartupError, String(error));
          for (const sentence of sentences) assert.match(error.message, sentence);
          assert.ok(!error.message.includes('\n'));
          return true;
        },
      );
    } finally {
      copy.close();
    }
  });
}

/** Runs a check on a changed copy that must still be readable. */
function withCopy(source: string, change: (copy: CheckpointCopy) => void, check: (folder: string) => void): void {
  const copy = new CheckpointCopy(join(FIXTURES, source));
  try {
    change(copy);
    check(copy.folder);
  } finally {
    copy.close();
  }
}

test('a checkpoint without its MTP module is served without, and says so', () =>
  withCopy(
    'v2-lite-bf16',
    (copy) => copy.editJson('config.json', (config) => void (config['num_nextn_predict_layers'] = 1)),
    (folder) => {
      const checkpoint = readCheckpoint(folder);
      assert.equal(checkpoint.spec.numMtpLayers, 0);
      assert.match(checkpoint.notes.join(), /MTP/);
    },
  ));

test('tensors that nobody asked for are noted, rotary frequencies are not', () =>
  withCopy(
    'v2-lite-bf16',
    (copy) =>
      copy.editHeader(SHARDS[1], (header) => {
        header['extra.weight'] = { dtype: 'I64', shape: [0], data_offsets: [0, 0] };
        header['model.layers.0.self_attn.rotary_emb.inv_freq'] = { dtype: 'F32', shape: [0], data_offsets: [0, 0] };
      }),
    (folder) => {
      const { notes } = readCheckpoint(folder);
      assert.equal(notes.filter((note) => note.includes('"extra.weight"')).length, 1);
      assert.match(notes.join(), /1 tensor\(s\)/);
    },
  ));

test("Transformers 5's rope_parameters mean what rope_theta and rope_scaling mean", () => {
  const before = readCheckpoint(join(FIXTURES, 'v3-fp8-mtp')).spec;
  withCopy(
    'v3-fp8-mtp',
    (copy) =>
      copy.editJson('config.json', (config) => {
        const { type, ...scaling } = config['rope_scaling'] as Record<string, unknown>;
        config['rope_parameters'] = { rope_type: type, rope_theta: config['rope_theta'], ...scaling };
        delete config['rope_scaling'];
        delete config['rope_theta'];
      }),
    (folder) => assert.deepEqual(readCheckpoint(folder).spec, before),
  );
  withCopy(
    'v3-fp8-mtp',
    (copy) =>
      copy.editJson('config.json', (config) => {
        config['rope_parameters'] = { rope_type: 'default', rope_theta: 5000 };
        delete config['rope_scaling'];
      }),
    (folder) => {
      const { spec } = readCheckpoint(folder);
      assert.deepEqual([spec.ropeTheta, spec.yarn], [5000, null]);
    },
  );
});

test('generation_config.json: defaults, and the eos ids as a number or a list', () =>
  withCopy(
    'v3-fp8-mtp',
    (copy) =>
      copy.writeJson('generation_config.json', {
        do_sample: true,
        temperature: 0.7,
        top_p: 0.9,
        top_k: 20,
        min_p: 0.05,
        repetition_penalty: 1.1,
        eos_token_id: [1, 7, 1],
      }),
    (folder) =>
      assert.deepEqual(readCheckpoint(folder).defaults, {
        doSample: true,
        temperature: 0.7,
        topP: 0.9,
        topK: 20,
        minP: 0.05,
        repetitionPenalty: 1.1,
        eosTokenIds: [1, 7],
      }),
  ));

test('a header with any byte changed is read or refused with a sentence, never anything else', () => {
  withCopy(
    'v2-lite-bf16',
    () => {},
    (folder) => {
      const copy = new CheckpointCopy(folder);
      try {
        fc.assert(
          fc.property(fc.nat(4630), fc.nat(255), fc.boolean(), (index, byte, isDigit) => {
            let before = 0;
            const set = (bytes: Buffer, value: number) => {
              before = bytes[index]!;
              bytes[index] = value;
              return bytes;
            };
            copy.editBytes(SHARDS[0], (bytes) => set(bytes, isDigit ? 0x30 + (byte % 10) : byte));
            try {
              readSafetensorsHeader(copy.path(SHARDS[0]));
            } catch (error) {
              assert.ok(error instanceof StartupError, String(error));
            }
            copy.editBytes(SHARDS[0], (bytes) => set(bytes, before));
          }),
          { numRuns: 300 },
        );
      } finally {
        copy.close();
      }
    },
  );
});
