import {
  closeSync,
  copyFileSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { POCKET_R1, type Header } from './checkpoint-copy.js';

const BLOCK = 128;
const CHUNK = 2 ** 22;
const SIZES = {
  vocab: 1024,
  hidden: 1024,
  dense: 2048,
  expert: 512,
  experts: 64,
  heads: 8,
  head: 64,
  kvRank: 512,
  qRank: 256,
  rope: 64,
};
type Tensor = [name: string, dtype: 'F8_E4M3' | 'BF16' | 'F32', ...shape: number[]];

function fp8(name: string, rows: number, columns: number): Tensor[] {
  return [
    [`${name}.weight`, 'F8_E4M3', rows, columns],
    [`${name}.weight_scale_inv`, 'F32', Math.ceil(rows / BLOCK), Math.ceil(columns / BLOCK)],
  ];
}

function layer(index: number): Tensor[] {
  const { hidden, dense, expert, experts, heads, head, kvRank, qRank, rope } = SIZES;
  const at = `model.layers.${index}`;
  const mlp = (name: string, size: number): Tensor[] => [
    ...fp8(`${name}.gate_proj`, size, hidden),
    ...fp8(`${name}.up_proj`, size, hidden),
    ...fp8(`${name}.down_proj`, hidden, size),
  ];
  return [
    [`${at}.input_layernorm.weight`, 'BF16', hidden],
    [`${at}.post_attention_layernorm.weight`, 'BF16', hidden],
    [`${at}.self_attn.q_a_layernorm.weight`, 'BF16', qRank],
    [`${at}.self_attn.kv_a_layernorm.weight`, 'BF16', kvRank],
    ...fp8(`${at}.self_attn.q_a_proj`, qRank, hidden),
    ...fp8(`${at}.self_attn.q_b_proj`, heads * (head + rope), qRank),
    ...fp8(`${at}.self_attn.kv_a_proj_with_mqa`, kvRank + rope, hidden),
    ...fp8(`${at}.self_attn.kv_b_proj`, heads * 2 * head, kvRank),
    ...fp8(`${at}.self_attn.o_proj`, hidden, heads * head),
    ...(index === 0
      ? mlp(`${at}.mlp`, dense)
      : [
          [`${at}.mlp.gate.weight`, 'BF16', experts, hidden] satisfies Tensor,
          [`${at}.mlp.gate.e_score_correction_bias`, 'F32', experts] satisfies Tensor,
          ...mlp(`${at}.mlp.shared_experts`, expert),
          ...Array.from({ length: experts }, (_, e) => mlp(`${at}.mlp.experts.${e}`, expert)).flat(),
        ]),
  ];
}

/**
 * A DeepSeek-V3 folder with pocket-r1's vocabulary and finite weights that mean nothing, about 103 MB a layer: for
 * what depends on size alone.
 */
export class LargeCheckpoint {
  readonly folder = mkdtempSync(join(tmpdir(), 'rodin-large-'));
  readonly weightBytes: number;

  constructor(numLayers: number) {
    const { vocab, hidden, dense, expert, experts, heads, head, kvRank, qRank, rope } = SIZES;
    const config = JSON.parse(readFileSync(join(POCKET_R1, 'config.json'), 'utf8')) as object;
    const sizes = {
      vocab_size: vocab,
      hidden_size: hidden,
      intermediate_size: dense,
      moe_intermediate_size: expert,
      n_routed_experts: experts,
      num_hidden_layers: numLayers,
      num_attention_heads: heads,
      num_key_value_heads: heads,
      kv_lora_rank: kvRank,
      q_lora_rank: qRank,
      qk_nope_head_dim: head,
      qk_rope_head_dim: rope,
      v_head_dim: head,
      num_nextn_predict_layers: 0,
    };
    writeFileSync(join(this.folder, 'config.json'), JSON.stringify({ ...config, ...sizes }));
    for (const name of ['tokenizer.json', 'tokenizer_config.json', 'generation_config.json']) {
      copyFileSync(join(POCKET_R1, name), join(this.folder, name));
    }
    const tensors: Tensor[] = [
      ['model.embed_tokens.weight', 'BF16', vocab, hidden],
      ['lm_head.weight', 'BF16', vocab, hidden],
      ['model.norm.weight', 'BF16', hidden],
      ...Array.from({ length: numLayers }, (_, index) => layer(index)).flat(),
    ];
    this.weightBytes = this.#write(tensors);
  }

  close(): void {
    rmSync(this.folder, { recursive: true, force: true });
  }

  #write(tensors: Tensor[]): number {
    const width = { F8_E4M3: 1, BF16: 2, F32: 4 };
    const header: Header = {};
    let end = 0;
    for (const [name, dtype, ...shape] of tensors) {
      const begin = end;
      end += width[dtype] * shape.reduce((product, size) => product * size, 1);
      header[name] = { dtype, shape, data_offsets: [begin, end] };
    }
    const text = Buffer.from(JSON.stringify(header));
    const padded = Buffer.concat([text, Buffer.alloc((8 - (text.length % 8)) % 8, ' ')]);
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(padded.length));
    // Every byte is 0x3c: about 1.5 as e4m3, 0.0115 as bf16 and as float32; no NaN in any of them.
    const chunk = Buffer.alloc(CHUNK, 0x3c);
    const file = openSync(join(this.folder, 'model.safetensors'), 'w');
    writeSync(file, Buffer.concat([length, padded]));
    for (let left = end; left > 0; left -= CHUNK) writeSync(file, chunk, 0, Math.min(left, CHUNK));
    closeSync(file);
    return end;
  }
}
