import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const POCKET_R1 = fileURLToPath(new URL('../../models/pocket-r1', import.meta.url));

const HELP = `Makes a folder that 'rodin serve --weights synthetic' serves: an architecture with pocket-r1's template and tokens.

  node --import tsx tests/bench/synthetic-folder.ts CONFIG.json FOLDER

The vocabulary is filled up with words that no text is made of, so that every token sampled is a word.
`;

interface Tokenizer {
  added_tokens: { id: number }[];
  model: { vocab: Record<string, number> };
}

const [configFile, folder] = process.argv.slice(2);
if (configFile === undefined || folder === undefined) {
  process.stdout.write(HELP);
  process.exit(2);
}
makeFolder(resolve(configFile), resolve(folder));

function makeFolder(config: string, to: string): void {
  mkdirSync(to, { recursive: true });
  copyFileSync(config, join(to, 'config.json'));
  for (const name of ['tokenizer_config.json', 'generation_config.json']) {
    copyFileSync(join(POCKET_R1, name), join(to, name));
  }
  const { vocab_size: vocabSize } = JSON.parse(readFileSync(config, 'utf8')) as { vocab_size: number };
  const tokenizer = JSON.parse(readFileSync(join(POCKET_R1, 'tokenizer.json'), 'utf8')) as Tokenizer;
  const { vocab } = tokenizer.model;
  const numKnown = Math.max(...Object.values(vocab), ...tokenizer.added_tokens.map(({ id }) => id)) + 1;
  for (let id = numKnown; id < vocabSize; id++) vocab[`Ġword${id}`] = id;
  writeFileSync(join(to, 'tokenizer.json'), JSON.stringify(tokenizer));
}
