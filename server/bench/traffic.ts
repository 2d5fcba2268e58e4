/** What a step must read and compute, from shapes alone. */
import type { HeadDtype } from '../engine/addon.js';
import type { ModelSpec, TensorEntry } from '../model/spec.js';

export interface Step {
  numSequences: number;
  /** tokens of each sequence in this step */
  numTokens: number;
  /** positions of each sequence before this step */
  context: number;
}

export interface Traffic {
  /** weights and cache rows, each once */
  bytes: number;
  /** of products; a multiply-add counts as two */
  flops: number;
}

/**
 * Experts are taken to be chosen uniformly: of E experts a step of T tokens, k each, reads E (1 - (1 - k/E)^T). The
 * embedding, of which a token reads one row, and MTP modules are left out; the head is computed once a sequence.
 */
export class TrafficModel {
  readonly #spec: ModelSpec;
  readonly #cacheBytesPerToken: number;
  #fixedBytes = 0;
  #expertBytes = 0;
  #fixedWeights = 0;
  #expertWeights = 0;
  #headWeights = 0;

  constructor(
    spec: ModelSpec,
    tensors: readonly TensorEntry[],
    cacheBytesPerToken: number,
    headDtype: HeadDtype = 'auto',
  ) {
    this.#spec = spec;
    this.#cacheBytesPerToken = cacheBytesPerToken;
    for (const { name, shape, bytes } of tensors) {
      const layer = Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? 0);
      if (layer >= spec.numHiddenLayers) continue;
      const isWeight = shape.length === 2 && !name.endsWith('_scale_inv');
      const weights = isWeight ? shape[0]! * shape[1]! : 0;
      const isHead = name === 'lm_head.weight' || (spec.tieWordEmbeddings && name === 'model.embed_tokens.weight');
      if (name.includes('.mlp.experts.')) {
        this.#expertBytes += bytes;
        this.#expertWeights += weights;
      } else if (isHead) {
        // Made FP8, a weight takes a byte; its scales are not counted.
        this.#fixedBytes += headDtype === 'fp8' ? Math.min(bytes, weights) : bytes;
        this.#headWeights += weights;
      } else if (name !== 'model.embed_tokens.weight') {
        this.#fixedBytes += bytes;
        this.#fixedWeights += weights;
      }
    }
  }

  of({ numSequences, numTokens, context }: Step): Traffic {
    const { numRoutedExperts, numExpertsPerToken } = this.#spec;
    const tokens = numSequences * numTokens;
    const share = numRoutedExperts === 0 ? 0 : numExpertsPerToken / numRoutedExperts;
    const expertBytes = this.#expertBytes * (1 - (1 - share) ** tokens);
    const cacheBytes = numSequences * (context + numTokens) * this.#cacheBytesPerToken;
    const products = tokens * (this.#fixedWeights + this.#expertWeights * share) + numSequences * this.#headWeights;
    const keys = tokens * (context + (numTokens + 1) / 2);
    return {
      bytes: this.#fixedBytes + expertBytes + cacheBytes,
      flops: 2 * products + 2 * keys * this.#productsPerKey,
    };
  }

  /** Products of one query token with one key and its value, all heads and layers; absorbed where there is MLA. */
  get #productsPerKey(): number {
    const { kvLoraRank, qkRopeHeadDim, headDim, numAttentionHeads, numHiddenLayers } = this.#spec;
    const perHead = kvLoraRank > 0 ? 2 * kvLoraRank + qkRopeHeadDim : 2 * headDim;
    return perHead * numAttentionHeads * numHiddenLayers;
  }
}
