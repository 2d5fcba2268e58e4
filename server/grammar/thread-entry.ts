/** Thread entry: follows the grammars of sequences and answers with masks. */
import { readFileSync } from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import { LRUCache } from 'lru-cache';
import { CompiledGrammar, Matcher } from './matcher.js';
import type { GrammarCommand, GrammarReply, GrammarThreadData } from './protocol.js';
import { readTokenTable, TokenTree } from './vocabulary.js';

const MAX_COMPILED = 64;

type TokenizerFile = Parameters<typeof readTokenTable>[0];

const { tokenizer, vocabSize } = workerData as GrammarThreadData;
const port = parentPort!;
const tree = new TokenTree(readTokenTable(JSON.parse(readFileSync(tokenizer, 'utf8')) as TokenizerFile, vocabSize));
const compiled = new LRUCache<string, CompiledGrammar>({ max: MAX_COMPILED });
const matchers = new Map<number, Matcher>();

port.on('message', (command: GrammarCommand) => {
  const { handle } = command;
  if (command.type === 'close') return void matchers.delete(handle);
  let reply: GrammarReply;
  try {
    const matcher = command.type === 'open' ? open(command) : matchers.get(handle);
    if (matcher === undefined) throw new Error('the sequence follows no grammar');
    matcher.accept(command.tokens);
    reply = { type: 'mask', handle, mask: matcher.mask(command.numLeft) };
  } catch (error) {
    matchers.delete(handle);
    reply = { type: 'failed', handle, message: (error as Error).message };
  }
  port.postMessage(reply);
});
port.postMessage({ type: 'ready' } satisfies GrammarReply);

function open({ handle, key, grammar, stopIds }: Extract<GrammarCommand, { type: 'open' }>): Matcher {
  let grammarOfKey = compiled.get(key);
  if (grammarOfKey === undefined) compiled.set(key, (grammarOfKey = new CompiledGrammar(grammar, tree)));
  const matcher = new Matcher(
    grammarOfKey,
    stopIds.filter((id) => tree.table.controls.has(id)),
  );
  matchers.set(handle, matcher);
  return matcher;
}
