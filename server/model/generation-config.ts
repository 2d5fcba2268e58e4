import { Fields } from './fields.js';
import type { JsonObject } from './json-file.js';
import { readTokenIds } from './model-config.js';
import type { GenerationDefaults } from './spec.js';

/** A JSON file and the object read from it. */
export interface ConfigFile {
  file: string;
  object: JsonObject;
}

/** generation_config.json where there is one; the eos ids of config.json where it names none. */
export function readGenerationDefaults(
  generation: ConfigFile | null,
  config: ConfigFile,
  vocabSize: number,
): GenerationDefaults {
  const defaults: GenerationDefaults = { eosTokenIds: [] };
  if (generation !== null) {
    const fields = new Fields(generation.object, generation.file);
    if (fields.has('do_sample')) defaults.doSample = fields.boolean('do_sample');
    if (fields.has('temperature')) {
      defaults.temperature = fields.number('temperature');
      if (defaults.temperature < 0) fields.fail('temperature', 'at least 0');
    }
    if (fields.has('top_p')) {
      defaults.topP = fields.positive('top_p');
      if (defaults.topP > 1) fields.fail('top_p', 'at most 1');
    }
    if (fields.has('top_k')) defaults.topK = fields.count('top_k', 0);
    if (fields.has('min_p')) {
      defaults.minP = fields.number('min_p');
      if (defaults.minP < 0 || defaults.minP > 1) fields.fail('min_p', 'between 0 and 1');
    }
    if (fields.has('repetition_penalty')) defaults.repetitionPenalty = fields.positive('repetition_penalty');
    defaults.eosTokenIds = readTokenIds(generation.object, 'eos_token_id', vocabSize, generation.file);
  }
  if (defaults.eosTokenIds.length === 0) {
    defaults.eosTokenIds = readTokenIds(config.object, 'eos_token_id', vocabSize, config.file);
  }
  return defaults;
}
