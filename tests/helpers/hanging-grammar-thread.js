// A grammar thread that hangs on the key 'hang', and on a token 13 of any other; it allows every token.
import { parentPort } from 'node:worker_threads';

parentPort.on('message', ({ type, handle, key, tokens }) => {
  if (type === 'close') return;
  if (key === 'hang' || (type === 'accept' && tokens.includes(13))) for (;;);
  parentPort.postMessage({ type: 'mask', handle, words: Int32Array.of(-1, tokens.length) });
});
parentPort.postMessage({ type: 'ready' });
