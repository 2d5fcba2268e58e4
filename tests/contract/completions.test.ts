import assert from 'node:assert/strict';
import { test } from 'node:test';
import { oneByOne } from './fake-engine.js';
import { DOCUMENT, eventsOf, startHarness, validatorsOf, type Harness } from './harness.js';

const ours = validatorsOf(DOCUMENT);
const openaiDocument = process.env['RODIN_OPENAI_SPEC'];
const theirs = openaiDocument ? validatorsOf(openaiDocument) : null;

function check(body: any): void {
  const isOurs = ours('Completion');
  assert.equal(isOurs(body), true, JSON.stringify(isOurs.errors));
  // Theirs knows no chunk that goes on.
  if (theirs === null || body.choices.some((choice: any) => choice.finish_reason === null)) return;
  const isTheirs = theirs('CreateCompletionResponse');
  assert.equal(isTheirs(body), true, JSON.stringify(isTheirs.errors));
}

async function post(
  harness: Harness,
  url: string,
  payload: object,
): Promise<{ status: number; body: any; text: string }> {
  const { statusCode, body, headers } = await harness.app.inject({ method: 'POST', url, payload });
  const isJson = String(headers['content-type']).startsWith('application/json');
  return { status: statusCode, body: isJson ? JSON.parse(body) : null, text: body };
}

const complete = (harness: Harness, payload: object): ReturnType<typeof post> =>
  post(harness, '/v1/completions', { model: 'pocket-r1', ...payload });

test('prompts of every kind, whole and streamed', async () => {
  const harness = startHarness();
  const { engine, prompts } = harness;
  const ids = prompts.tokenizer.encodeText('Once upon');
  harness.engine.script = (request) =>
    oneByOne(harness.tokens(` a time ${request.promptIds.length}`, 'answer'), 'length')(request);
  for (const prompt of ['Once upon', ids, ['Once upon', 'Twice'], [ids, [5, 6]]]) {
    for (const echo of [false, true]) {
      const { status, body, text } = await complete(harness, { prompt, echo, n: 2, seed: 7 });
      assert.equal(status, 200, text);
      check(body);
      const isList = Array.isArray(prompt) && typeof prompt[0] !== 'number';
      assert.equal(body.choices.length, isList ? 4 : 2);
      assert.deepEqual(
        body.choices.map((choice: any) => choice.index),
        body.choices.map((_: unknown, i: number) => i),
      );
      assert.equal(body.choices[0].text, `${echo ? 'Once upon' : ''} a time ${ids.length}`);
      assert.equal(body.choices[0].finish_reason, 'length');
      const chunks = eventsOf((await complete(harness, { prompt, echo, n: 2, stream: true })).text);
      assert.equal(chunks.pop(), '[DONE]');
      chunks.forEach(check);
      for (const choice of body.choices) {
        const own = chunks.flatMap((chunk) => chunk.choices).filter(({ index }) => index === choice.index);
        assert.equal(own.map(({ text }) => text).join(''), choice.text);
        assert.deepEqual(own.map((piece) => piece.finish_reason).filter(Boolean), ['length']);
      }
    }
  }
  const [request] = engine.requests;
  assert.deepEqual([request!.promptIds, request!.sampling.maxTokens, request!.startPhase], [ids, 16, 'answer']);
  assert.equal(request!.markers.thinkEnd, -1);
  // Control tokens in a prompt are meant: it is all that the model sees.
  await complete(harness, { prompt: '<｜User｜>hi</think>' });
  assert.deepEqual(engine.requests.at(-1)!.promptIds, [3, ...prompts.tokenizer.encodeText('hi'), 6]);
  await harness.close();
});

test('log-probabilities, stop strings, usage', async () => {
  const harness = startHarness();
  const top = [{ id: 100, logprob: -0.25 }];
  const tokens = harness.tokens('né STOP b', 'answer').map((token) => ({ ...token, logprobs: { logprob: -1, top } }));
  harness.engine.script = oneByOne(tokens);
  const { body } = await complete(harness, { prompt: 'x', logprobs: 1, stop: 'STOP', stream: false });
  check(body);
  const [{ text, logprobs, finish_reason: reason }] = body.choices;
  assert.deepEqual([text, reason], ['né ', 'stop']);
  assert.equal(logprobs.tokens.length, body.usage.completion_tokens);
  assert.deepEqual(Object.values(logprobs.top_logprobs[0]).sort(), [-0.25, -1]);
  assert.equal(logprobs.text_offset[0], 0);
  const chunks = eventsOf(
    (await complete(harness, { prompt: 'x', stream: true, stream_options: { include_usage: true } })).text,
  );
  assert.equal(chunks.at(-2).usage.completion_tokens, tokens.length);
  await harness.close();
});

test('what cannot be completed is refused', async () => {
  const harness = startHarness();
  for (const [extra, code, param] of [
    [{ suffix: 'end' }, 'unsupported_value', 'suffix'],
    [{ prompt: undefined }, 'missing_required_parameter', 'prompt'],
    [{ prompt: '' }, 'invalid_value', 'prompt'],
    [{ prompt: [] }, 'invalid_value', 'prompt'],
    [{ prompt: [[]] }, 'invalid_value', 'prompt[0]'],
    [{ prompt: ['a', 5] }, 'invalid_type', 'prompt[1]'],
    [{ prompt: [1024] }, 'token_out_of_vocabulary', 'prompt[0]'],
    [{ prompt: [[1], [-1]] }, 'token_out_of_vocabulary', 'prompt[1][0]'],
    [{ prompt: Array(65).fill('a') }, 'invalid_value', 'prompt'],
    [{ prompt: 'word '.repeat(100_000) }, 'context_length_exceeded', 'prompt'],
    [{ echo: true, logprobs: 1 }, 'unsupported_value', 'echo'],
    [{ logprobs: true }, 'invalid_type', 'logprobs'],
    [{ best_of: 3 }, 'unsupported_value', 'best_of'],
    [{ max_tokens: 5000 }, 'context_length_exceeded', 'max_tokens'],
  ] as const) {
    const { status, body } = await complete(harness, { prompt: 'x', ...extra });
    assert.deepEqual([status, body.error.code, body.error.param], [400, code, param], body.error.message);
  }
  assert.equal(harness.engine.requests.length, 0);
  await harness.close();
});

test('tokens of texts and conversations, and back', async () => {
  const harness = startHarness();
  const { prompts } = harness;
  const isTokens = ours('TokenizeResponse');
  const tokenize = async (payload: object): Promise<any> => {
    const { status, body, text } = await post(harness, '/tokenize', payload);
    assert.equal(status, 200, text);
    assert.equal(isTokens(body), true, JSON.stringify(isTokens.errors));
    return body;
  };
  const plain = await tokenize({ prompt: 'né 苹果', return_token_strs: true });
  assert.deepEqual(plain.tokens, prompts.tokenizer.encodeText('né 苹果'));
  assert.deepEqual([plain.count, plain.max_model_len], [plain.tokens.length, 4096]);
  assert.equal(plain.token_strs.length, plain.count);
  const messages = [{ role: 'user', content: 'hi' }];
  const chat = await tokenize({ model: 'pocket-r1', messages });
  assert.deepEqual(chat.tokens, (await prompts.encode({ messages: messages as any, tools: null })).ids);
  assert.deepEqual((await tokenize({ messages, add_generation_prompt: false })).tokens, chat.tokens.slice(0, -2));
  assert.equal((await tokenize({ messages, enable_thinking: false })).tokens.at(-1), 6);
  const { body } = await post(harness, '/detokenize', { tokens: chat.tokens });
  assert.equal(ours('DetokenizeResponse')(body), true);
  assert.equal(body.prompt, '<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>');
  for (const [url, payload, param] of [
    ['/tokenize', {}, 'prompt'],
    ['/tokenize', { prompt: 'a', messages }, 'prompt'],
    ['/detokenize', { tokens: [1, 5000] }, 'tokens[1]'],
    ['/detokenize', {}, 'tokens'],
  ] as const) {
    const response = await post(harness, url, payload);
    assert.deepEqual([response.status, response.body.error.param], [400, param]);
  }
  await harness.close();
});
