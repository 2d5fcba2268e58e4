/** A grammar thread that hangs on the key 'hang', and on token 13 of any other; its masks allow every token. */
import { parentPort } from 'node:worker_threads';
import type { GrammarCommand, GrammarReply } from '../../server/grammar/protocol.js';

const port = parentPort!;

port.on('message', (command: GrammarCommand) => {
  if (command.type === 'close') return;
  const { handle, tokens } = command;
  const hangs = command.type === 'open' ? command.key === 'hang' : tokens.includes(13);
  while (hangs);
  const mask = { words: Int32Array.of(-1, tokens.length), numToEnd: 1, mostToEnd: 1 };
  port.postMessage({ type: 'mask', handle, mask } satisfies GrammarReply);
});
port.postMessage({ type: 'ready' } satisfies GrammarReply);
