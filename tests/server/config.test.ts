import assert from 'node:assert/strict';
import { test } from 'node:test';
import { readCommandLine, type Command } from '../../server/config.js';
import { StartupError } from '../../server/errors.js';
import { FLAGS, variableOf } from '../../server/flags.js';

function read(line: string, env: NodeJS.ProcessEnv = {}): any {
  const command: Command = readCommandLine(line.split(' ').filter(Boolean), env);
  if (command.kind === 'print') return command.text;
  return command.kind === 'build' ? command : command.config;
}

function refuses(line: string, words: RegExp, env: NodeJS.ProcessEnv = {}): void {
  assert.throws(
    () => read(line, env),
    (error) => error instanceof StartupError && words.test(error.message),
    line,
  );
}

test('defaults serve the bundled model', () => {
  const config = read('serve');
  assert.match(config.model, /models\/pocket-r1$/);
  assert.deepEqual(
    [config.host, config.port, config.device, config.compute, config.cacheMemory, config.apiKeys, config.maxBodyBytes],
    ['127.0.0.1', 8000, 'auto', 'auto', null, [], 8 << 20],
  );
  assert.deepEqual([config.deterministic, config.maxStepTokens], [false, null]);
  assert.ok(Object.isFrozen(config));
});

test('flags win over variables, variables over defaults', () => {
  assert.equal(read('serve', { RODIN_PORT: '81' }).port, 81);
  assert.equal(read('serve --port 82', { RODIN_PORT: '81' }).port, 82);
  assert.equal(read('serve', { RODIN_PORT: '' }).port, 8000);
  assert.deepEqual(read('serve', { RODIN_API_KEY: 'a, b' }).apiKeys, ['a', 'b']);
  assert.deepEqual(read('serve --api-key c --api-key=d', { RODIN_API_KEY: 'a' }).apiKeys, ['c', 'd']);
  assert.equal(read('logits --prompts a --out b', { RODIN_DRAFT: 'true' }).draft, true);
  for (const line of ['serve', 'logits --prompts a --out b', 'bench step']) {
    assert.equal(read(`${line} --deterministic`).deterministic, true);
    assert.equal(read(line, { RODIN_DETERMINISTIC: 'true' }).deterministic, true);
  }
});

test('sizes have units', () => {
  for (const [text, bytes] of [
    ['512MiB', 2 ** 29],
    ['1.5GiB', 1.5 * 2 ** 30],
    ['2GB', 2e9],
    ['1000', 1000],
    ['7kb', 7000],
  ] as const) {
    assert.equal(read(`serve --cache-memory ${text}`).cacheMemory, bytes);
  }
  for (const text of ['0', '-1', '1XB', 'lots', '1e9', '99999999999TiB']) {
    refuses(`serve --cache-memory=${text}`, /--cache-memory must be a size such as 512MiB/);
  }
});

test('what cannot be used is refused with a sentence that names it', () => {
  refuses('prove', /no command 'prove'; the commands are serve, logits, bench, doctor, build/);
  refuses('toString', /no command/);
  refuses('serve --prot 1', /no flag --prot; 'rodin serve --help'/);
  refuses('serve --last 3', /no flag --last/);
  refuses('serve model', /'model' belongs to no flag/);
  refuses('serve --port', /argument missing/);
  refuses('serve --port 1 --port 2', /--port is given 2 times/);
  for (const port of ['-1', '65536', 'x', '1.5', '1e3', '0x10'])
    refuses(`serve --port=${port}`, /--port must be a whole number/);
  refuses('serve', /^RODIN_PORT must be a whole number/, { RODIN_PORT: 'x' });
  refuses('serve --device gpu', /auto, cpu or cuda:N/);
  refuses('serve --compute bf16', /one of auto, float32/);
  refuses('serve --reasoning-field thoughts', /one of reasoning_content, reasoning, both/);
  refuses('serve --cors-origin example.org', /an origin such as/);
  refuses('serve --max-num-seqs 64 --max-step-tokens 32', /must be at least --max-num-seqs/);
  refuses('logits', /--prompts FILE is needed/);
  refuses('logits --prompts a', /--out FILE is needed/);
  refuses('serve --api-key=', /must not be empty/);
});

test('help, version and variables come from the one table', () => {
  assert.match(read(''), /rodin serve[\s\S]*rodin logits/);
  assert.match(read('--version'), /^rodin \d+\.\d+\.\d+$/);
  assert.equal(read('serve --version'), read('--version'));
  for (const command of ['serve', 'logits'] as const) {
    const help = read(`${command} --help`);
    for (const flag of FLAGS) {
      const isThere = flag.commands.includes(command);
      assert.equal(
        help.includes(`--${flag.name} `) && help.includes(`${variableOf(flag)}]`),
        isThere,
        `${command} ${flag.name}`,
      );
    }
  }
  const warnings = read('serve', { RODIN_APIKEY: 'secret', RODIN_LAST: '3', PATH: 'x' }).warnings;
  assert.equal(warnings.length, 1);
  assert.match(warnings[0], /RODIN_APIKEY/);
  assert.doesNotMatch(warnings[0], /secret/);
});
