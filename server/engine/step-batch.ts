/**
 * One step's batch and result as flat typed arrays: the message to the addon, twin of addon/engine/step.h.
 * S sequences, T tokens in all, R = sum(numSampled) sampled rows.
 *
 * Sequence s owns tokens qStart[s] .. qStart[s+1]-1. The last numSampled[s] of them are sampled: 0 in the
 * middle of a prefill, 1 otherwise (1 + drafts when drafts are verified: the first sampled row is the last confirmed
 * token, the others are drafts). A draft is accepted where it equals the token sampled from the row before it and all
 * drafts before it were accepted; whatever follows a rejected draft means nothing.
 */
export interface StepBatch {
  /** -1 - r: the token that row r of the step before samples; in a sequence's only sampled row, without runMtp */
  tokenIds: Int32Array; // [T]
  positions: Int32Array; // [T] absolute position of each token
  /** block_id * block_size + offset where the token's latent goes; -1: already there, do not write */
  slotMapping: Int32Array; // [T]
  qStart: Int32Array; // [S + 1]
  blockTableStart: Int32Array; // [S + 1]
  blockTable: Int32Array; // [blockTableStart[S]] ids of the blocks covering positions 0 .. last
  numSampled: Int32Array; // [S]
  /**
   * 1: the MTP module's entries of this step's confirmed tokens are made: of every token but the sequence's first in
   * this step, and of the last one sampled. The block table covers that token's position, and those of all drafts but
   * the last.
   */
  runMtp: Uint8Array; // [S]
  /** drafts wanted for the next step, 0 .. MAX_DRAFTS; above 0 only with runMtp and a sampled row */
  numDrafts: Int32Array; // [S]

  // sampling, per sequence
  /** 0 is greedy */
  temperature: Float32Array; // [S]
  topP: Float32Array; // [S] 1 is off
  topK: Int32Array; // [S] 0 is off
  minP: Float32Array; // [S] 0 is off
  seedLow: Uint32Array; // [S]
  seedHigh: Uint32Array; // [S]
  presencePenalty: Float32Array; // [S]
  frequencyPenalty: Float32Array; // [S]
  repetitionPenalty: Float32Array; // [S] 1 is off
  /** -1: none; 0: of the sampled token alone; k: also the k most likely */
  numLogprobs: Int32Array; // [S]

  // token history of sequences with a penalty, up to their first sampled row; empty range for the others. The runner
  // adds the drafts before a row to that row's history.
  historyStart: Int32Array; // [S + 1]
  historyIds: Int32Array; // [historyStart[S]] distinct ids seen so far in prompt or completion
  historyCounts: Int32Array; // [historyStart[S]] times in the completion (0: only in the prompt)

  // added to the logits before everything else; -Infinity bans
  biasStart: Int32Array; // [S + 1]
  biasIds: Int32Array; // [biasStart[S]]
  biasValues: Float32Array; // [biasStart[S]]

  // which tokens a sequence's grammar leaves, applied after bias and penalties; empty range: all of them
  maskStart: Int32Array; // [S + 1]
  /** ceil(vocab_size / 32) words per masked sequence; bit id % 32 of word id / 32, 1 is allowed */
  masks: Int32Array; // [maskStart[S]]

  /** token indices in 0..T-1 whose raw logits come back (the tool `rodin logits`) */
  logitRows: Int32Array; // [L]
  /**
   * token indices whose MTP logits come back: row j is made from token j and the hidden state of token j-1 of
   * the same sequence, which must be in this step too, with runMtp.
   */
  draftLogitRows: Int32Array; // [D]
}

export interface StepResult {
  sampledIds: Int32Array; // [R]
  /** log-softmax of the raw logits (before bias, penalties, temperature) at the sampled token; 0 where not asked for */
  sampledLogprobs: Float32Array; // [R]
  /** where row r's most likely tokens start */
  topStart: Int32Array; // [R + 1]
  topIds: Int32Array; // [topStart[R]] by falling log-probability, ties by lower id
  topLogprobs: Float32Array; // [topStart[R]]
  /** 1 where a row's logits held a NaN or an infinity: its sampled id is -1 and must not be used */
  nonFinite: Uint8Array; // [R]
  logits: Float32Array; // [L, vocab_size]
  draftLogits: Float32Array; // [D, vocab_size]
  draftStart: Int32Array; // [S + 1]
  /** drafts for the next step, fewer than asked for where the MTP module's logits are not finite */
  draftIds: Int32Array; // [draftStart[S]]
  /** time on the engine thread, microseconds; of a step begun while another ran, from the end of that one */
  stepMicros: number;
  /** of stepMicros, what the MTP module took */
  draftMicros: number;
  /** from the step's first work on the device to its last; 0 where nothing was sampled */
  deviceMicros: number;
  /** since the end of the step before: how long the device waited for this one */
  idleMicros: number;
}

/** Most drafts of a sequence in one step. */
export const MAX_DRAFTS = 8;
