import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { Ajv2020 } from 'ajv/dist/2020.js';
import formatsPlugin from 'ajv-formats';
import OpenAI from 'openai';
import { SchemaCompiler } from '../../server/grammar/schema-check.js';
import { SchemaError } from '../../server/grammar/schema-error.js';
import { randomBelow, randomSchema } from '../helpers/schema-samples.js';
import { pooled, readEvents, Server } from './server.js';

const NUM_SCHEMAS = 200;

let server: Server;

before(async () => {
  server = await Server.start('--speculative-tokens', '0');
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

const ask = (content: string) => [{ role: 'user' as const, content }];
const jsonSchema = (schema: object) => ({
  type: 'json_schema' as const,
  json_schema: { name: 'answer', schema: schema as Record<string, unknown> },
});

const PERSON = {
  type: 'object',
  properties: {
    name: { type: 'string', minLength: 1, maxLength: 12 },
    age: { type: 'integer', minimum: 0, maximum: 150 },
    tags: { type: 'array', items: { enum: ['a', 'b', 'c'] }, uniqueItems: true },
  },
  required: ['name', 'age', 'tags'],
  additionalProperties: false,
};

const ajv = new Ajv2020({ strict: false });
(formatsPlugin as unknown as (ajv: Ajv2020) => void)(ajv);

function validator(schema: object) {
  return ajv.compile(schema);
}

test(`${NUM_SCHEMAS} schemas of growing hardness at temperature 1: every answer is valid for Ajv`, async (context) => {
  const compiler = new SchemaCompiler();
  const schemas = Array.from({ length: NUM_SCHEMAS }, (_, index) => {
    return randomSchema(randomBelow(1000 + index), Math.floor((6 * index) / NUM_SCHEMAS));
  });
  let [numRefused, numLong] = [0, 0];
  await pooled(schemas, 8, async (schema) => {
    const response = await server.chat({
      messages: ask('Write the JSON.'),
      response_format: jsonSchema(schema),
      temperature: 1,
      seed: 7,
      thinking: { type: 'disabled' },
      max_tokens: 500,
    });
    const body = (await response.json()) as any;
    if (response.status === 400) {
      assert.throws(() => compiler.compile(schema), SchemaError);
      return void numRefused++;
    }
    assert.equal(response.status, 200, JSON.stringify(body));
    const [{ message, finish_reason: reason }] = body.choices;
    assert.equal(reason, 'stop', message.content);
    if (body.usage.completion_tokens > 480) numLong++;
    const validate = validator(schema);
    const text = `${JSON.stringify(schema)}\n${message.content}`;
    assert.ok(validate(JSON.parse(message.content)), `${text}\n${JSON.stringify(validate.errors)}`);
  });
  context.diagnostic(
    `${NUM_SCHEMAS} schemas: ${numRefused} refused, ${numLong} answers closed near their limit of 500 tokens`,
  );
  assert.ok(numRefused <= NUM_SCHEMAS / 20, `${numRefused} refused`);
});

test('with thinking: reasoning is free, the answer is held to the schema; whole and streamed alike', async () => {
  const request = { messages: ask('Describe a person.'), response_format: jsonSchema(PERSON), temperature: 1, seed: 3 };
  const body = await server.json(request);
  const { message } = body.choices[0];
  assert.ok(message.reasoning_content.length > 0);
  assert.ok(validator(PERSON)(JSON.parse(message.content)), message.content);
  const { events, isDone } = await readEvents(await server.chat({ ...request, stream: true }));
  assert.ok(isDone);
  const deltas = events.map((event) => event.choices[0].delta);
  assert.equal(deltas.map((delta) => delta.content ?? '').join(''), message.content);
  assert.equal(events.at(-1).choices[0].finish_reason, 'stop');
});

test('a held answer does not depend on the batch around it', async () => {
  const request = {
    messages: ask('Describe a person.'),
    response_format: jsonSchema(PERSON),
    temperature: 1,
    seed: 11,
  };
  const alone = (await server.json(request)).choices[0].message.content;
  const crowd = Array.from({ length: 12 }, (_, index) =>
    server.json({
      messages: ask(`Tell me of ${index}.`),
      max_tokens: 60,
      ...(index % 2 ? { guided_regex: '[a-z ]{20,30}' } : {}),
    }),
  );
  assert.equal((await server.json(request)).choices[0].message.content, alone);
  await Promise.all(crowd);
});

test('drafts change nothing in a held answer', async () => {
  const speculating = await Server.start('--speculative-tokens', '2');
  try {
    for (const [seed, limit] of [[1], [2], [3, 48], [4, 60], [5, 80]]) {
      const request = {
        messages: ask('What is 12 + 30?'),
        response_format: jsonSchema(PERSON),
        temperature: 1,
        seed,
        max_tokens: limit ?? null,
        return_token_ids: true,
      };
      const [plain, drafted] = [await server.json(request), await speculating.json(request)];
      assert.deepEqual(drafted.choices[0].token_ids, plain.choices[0].token_ids);
      assert.ok(validator(PERSON)(JSON.parse(drafted.choices[0].message.content)));
    }
    assert.ok((await speculating.metric('vllm:spec_decode_num_accepted_tokens_total')) > 0);
  } finally {
    assert.equal(await speculating.stop(), 0);
  }
});

test('json_object, regex, choice, grammar, in every spelling', async () => {
  const grammar = 'root ::= "<" [a-z]{2,4} ">"';
  const cases: [object, RegExp][] = [
    [{ structured_outputs: { regex: '[a-z]{3}-\\d{4}' } }, /^[a-z]{3}-\d{4}$/],
    [{ guided_regex: '(yes|no)!{2}' }, /^(yes|no)!!$/],
    [{ regex: 'x{0,3}y' }, /^x{0,3}y$/],
    [{ structured_outputs: { choice: ['left', 'right', 'ünder'] } }, /^(left|right|ünder)$/],
    [{ guided_choice: ['a'] }, /^a$/],
    [{ structured_outputs: { grammar } }, /^<[a-z]{2,4}>$/],
    [{ guided_grammar: grammar }, /^<[a-z]{2,4}>$/],
    [{ ebnf: grammar }, /^<[a-z]{2,4}>$/],
    [{ grammar }, /^<[a-z]{2,4}>$/],
    [{ guided_json: '{"const": {"k": [1, "é"]}}' }, /^\{"k":\[1,"é"\]\}$/],
    [{ json_schema: { type: 'boolean' } }, /^(true|false)$/],
    [{ structured_outputs: { json: { type: 'null' } } }, /^null$/],
    [{ response_format: { type: 'text' }, max_tokens: 5 }, /^/],
  ];
  for (const [format, pattern] of cases) {
    const body = await server.json({
      messages: ask('Hello'),
      temperature: 1,
      thinking: { type: 'disabled' },
      ...format,
    });
    assert.match(body.choices[0].message.content, pattern, JSON.stringify(format));
  }
  const request = { messages: ask('A JSON object.'), response_format: { type: 'json_object' }, temperature: 0.7 };
  for (const seed of [1, 2, 3]) {
    const { finish_reason: reason, message } = (await server.json({ ...request, seed, max_tokens: 800 })).choices[0];
    if (reason === 'length') assert.match(message.content ?? '', /^(\{|$)/);
    else assert.equal(typeof JSON.parse(message.content), 'object');
  }
});

test('near the token limit a held answer is closed; thinking leaves it the room', async () => {
  const endless = { type: 'object', properties: { a: { type: 'array', minItems: 2 }, b: { type: 'string' } }, required: ['a', 'b'] }; // prettier-ignore
  const validate = validator(endless);
  await pooled([24, 30, 40, 60, 90], 5, async (limit) => {
    for (const thinking of ['disabled', 'enabled']) {
      for (const seed of [1, 2, 3]) {
        const body = await server.json({
          messages: ask('What is 12 + 30?'),
          response_format: jsonSchema(endless),
          thinking: { type: thinking },
          temperature: 1,
          max_tokens: limit,
          seed,
        });
        const [{ message, finish_reason: reason }] = body.choices;
        const shown = `${limit} ${thinking} ${JSON.stringify(message)}`;
        assert.equal(reason, 'stop', shown);
        assert.ok(validate(JSON.parse(message.content)), shown);
        assert.ok(body.usage.completion_tokens <= limit, shown);
      }
    }
  });
  const call = {
    messages: ask('Hello'),
    tools: [WEATHER],
    tool_choice: 'required',
    temperature: 1,
    thinking: { type: 'disabled' },
  };
  for (const seed of [1, 2, 3]) {
    const { choices } = await server.json({ ...call, seed, max_tokens: 40 });
    assert.equal(choices[0].finish_reason, 'tool_calls');
    for (const made of choices[0].message.tool_calls) {
      assert.ok(validator(WEATHER.function.parameters)(JSON.parse(made.function.arguments)), made.function.arguments);
    }
  }
});

test('a token limit below the shortest answer cuts it with finish_reason length', async () => {
  const body = await server.json({
    messages: ask('x'),
    guided_regex: 'a{100}b',
    thinking: { type: 'disabled' },
    max_tokens: 20,
  });
  assert.equal(body.choices[0].finish_reason, 'length');
  assert.match(body.choices[0].message.content, /^a+$/);
});

const WEATHER = {
  type: 'function' as const,
  function: {
    name: 'get_weather',
    parameters: {
      type: 'object',
      properties: { city: { type: 'string', maxLength: 12 }, days: { type: 'integer', minimum: 1, maximum: 9 } },
      required: ['city', 'days'],
      additionalProperties: false,
    },
  },
};
const CLOCK = {
  type: 'function' as const,
  function: { name: 'get_time', parameters: { type: 'object', properties: {}, additionalProperties: false } },
};

test('tool_choice: required, by name, allowed tools; one call where parallel ones are off', async () => {
  const client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: 'none', maxRetries: 0 });
  const tools = [WEATHER, CLOCK];
  const call = async (rest: object) => {
    const { choices } = await client.chat.completions.create({
      model: 'pocket-r1',
      messages: ask('Tell me a joke about lions.'),
      tools,
      temperature: 1,
      seed: 5,
      max_tokens: 1000,
      ...rest,
    } as OpenAI.ChatCompletionCreateParamsNonStreaming);
    const calls = choices[0]!.message.tool_calls ?? [];
    return calls.map((made) => (made.type === 'function' ? made.function : assert.fail()));
  };
  const isWeather = validator(WEATHER.function.parameters);
  for (const seed of [1, 2, 3, 4]) {
    const calls = await call({ tool_choice: 'required', parallel_tool_calls: false, seed });
    assert.equal(calls.length, 1);
    if (calls[0]!.name === 'get_weather') assert.ok(isWeather(JSON.parse(calls[0]!.arguments)), calls[0]!.arguments);
    else assert.deepEqual([calls[0]!.name, JSON.parse(calls[0]!.arguments)], ['get_time', {}]);
  }
  const named = await call({ tool_choice: { type: 'function', function: { name: 'get_weather' } } });
  assert.deepEqual(
    named.map(({ name }) => name),
    ['get_weather'],
  );
  assert.ok(isWeather(JSON.parse(named[0]!.arguments)));
  const allowed = await call({
    tool_choice: {
      type: 'allowed_tools',
      allowed_tools: { mode: 'required', tools: [{ type: 'function', function: { name: 'get_time' } }] },
    },
    parallel_tool_calls: false,
  });
  assert.deepEqual(
    allowed.map(({ name }) => name),
    ['get_time'],
  );
});

test('strict tools: free to answer or to call, arguments are held to the schema', async () => {
  const strict = { ...WEATHER, function: { ...WEATHER.function, strict: true } };
  const isWeather = validator(WEATHER.function.parameters);
  const bodies = await pooled([1, 2, 3, 4, 5, 6], 3, (seed) =>
    server.json({
      messages: ask('What is the weather in Paris?'),
      tools: [strict],
      temperature: 1,
      seed,
      max_tokens: 600,
    }),
  );
  for (const { choices } of bodies) {
    for (const call of choices[0].message.tool_calls ?? []) assert.ok(isWeather(JSON.parse(call.function.arguments)));
  }
  assert.ok(bodies.some(({ choices }) => choices[0].finish_reason === 'tool_calls'));
  const plain = await server.json({ messages: ask('Hello'), tools: [strict], temperature: 0 });
  assert.ok(plain.choices[0].message.content.length > 0);
});

test('formats that are wrong or cannot be held to: 400 within a second, and running streams go on', async () => {
  const stream = readEvents(
    await server.chat({ messages: ask('Go on.'), stream: true, ignore_eos: true, max_tokens: 400, temperature: 0 }),
  );
  const held = server.json({ messages: ask('Go on.'), guided_regex: '[a-z ]{150}', thinking: { type: 'disabled' } });
  const invalid = { type: 'object', properties: { a: { type: 'strnig' } } };
  let deep: object = { type: 'null' };
  for (let depth = 0; depth < 300; depth++) deep = { type: 'array', items: deep };
  const bad: [object, string, RegExp][] = [
    [{ response_format: jsonSchema(invalid) }, 'response_format.json_schema.schema', /'\/properties\/a\/type'/],
    [{ response_format: jsonSchema(invalid) }, 'response_format.json_schema.schema', /'\/properties\/a\/type'/],
    ...Array.from({ length: 40 }, (_, index): [object, string, RegExp] => [
      { guided_json: { type: 'string', pattern: `(${'a'.repeat(index)}` } },
      'guided_json',
      /'\/pattern'/,
    ]),
    [{ guided_json: deep }, 'guided_json', /nested deeper/],
    [{ guided_json: { not: {} } }, 'guided_json', /'\/not'/],
    [{ structured_outputs: { json: '{"type": ' } }, 'structured_outputs.json', /no JSON/],
    [{ structured_outputs: { json: {}, regex: 'a' } }, 'structured_outputs.regex', /one of them/],
    [{ structured_outputs: { jsom: {} } }, 'structured_outputs.jsom', /jsom/],
    [{ regex: '(a)\\1' }, 'regex', /back references/],
    [{ guided_choice: [] }, 'guided_choice', /1 to 1024/],
    [{ ebnf: 'root ::= nothing' }, 'ebnf', /line 1/],
    [{ ebnf: 'root ::= root "a" | "b"' }, 'ebnf', /begins with itself/],
    [{ ebnf: `root ::= ${'("a" | "a")* '.repeat(40)} ([a-z]* [a-z]* [a-z]*)* "!"` }, 'ebnf', /^$/],
    [{ response_format: { type: 'xml' } }, 'response_format.type', /json_schema/],
    [{ response_format: { type: 'json_schema' } }, 'response_format.json_schema.schema', /missing/],
    [{ guided_regex: 'a', ignore_eos: true }, 'ignore_eos', /remove it/],
    [{ tool_choice: 'required' }, 'tool_choice', /no 'tools'/],
    [{ tool_choice: { type: 'function', function: { name: 'x' } }, tools: [WEATHER] }, 'tool_choice', /none of them/],
    [{ tools: [{ type: 'function', function: { name: 'f', strict: true, parameters: { not: {} } } }] }, 'tools[0].function.parameters', /'\/not'/], // prettier-ignore
  ];
  for (const [format, param, pattern] of bad) {
    const startedAt = performance.now();
    const response = await server.chat({ messages: ask('x'), max_tokens: 4, ...format });
    const elapsed = performance.now() - startedAt;
    assert.ok(elapsed < 1000, `${elapsed} ms for ${JSON.stringify(format).slice(0, 200)}`);
    const body = (await response.json()) as any;
    if (pattern.source === '^$') continue; // ambiguous, but it can be followed
    assert.equal(response.status, 400, JSON.stringify(format).slice(0, 200));
    assert.equal(body.error.param, param);
    assert.match(body.error.message, pattern);
  }
  const { events, isDone } = await stream;
  assert.ok(isDone);
  assert.equal(events.at(-1).choices[0].finish_reason, 'length');
  assert.match((await held).choices[0].message.content, /^[a-z ]{150}$/);
});

test('aborted while held: nothing is left behind', async () => {
  await pooled(
    Array.from({ length: 40 }, (_, index) => index),
    8,
    async (index) => {
      const controller = new AbortController();
      const format = index % 2 ? { guided_regex: '[a-z ]{300}' } : { response_format: jsonSchema(PERSON) };
      const response = await server.chat(
        { messages: ask(`Number ${index}`), stream: true, ...format },
        { signal: controller.signal },
      );
      setTimeout(() => controller.abort(), index * 3);
      await readEvents(response).catch(() => {});
    },
  );
  const isIdle = async () => (await server.metric('vllm:num_requests_running')) === 0;
  for (let waited = 0; !(await isIdle()) && waited < 50; waited++)
    await new Promise((resolve) => setTimeout(resolve, 50));
  const body = await server.json({ messages: ask('x'), guided_choice: ['done'] });
  assert.equal(body.choices[0].message.content, 'done');
});
