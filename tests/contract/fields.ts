/** Writes server/api/FIELDS.md and README's table from the contract: `node --import tsx tests/contract/fields.ts`. */
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';
import { REFUSED_MESSAGES } from '../../server/api/messages-unsupported.js';
import { REFUSED_RESPONSES } from '../../server/api/response-unsupported.js';
import { REFUSED, REFUSED_TEXT, type Refusal } from '../../server/api/unsupported.js';
import { DOCUMENT } from './harness.js';

export const FIELDS = new URL('../../server/api/FIELDS.md', import.meta.url);
export const README = new URL('../../README.md', import.meta.url);

interface Field {
  name: string;
  does: 'honoured' | 'refused (400)' | 'ignored';
  text: string;
}

/** Descriptions of fields that are taken and do nothing begin with this word. */
const IGNORED = /^Accepted[;,.]/;
const MARKS = ['<!-- fields: made by tests/contract/fields.ts -->\n\n', '\n\n<!-- end of fields -->'] as const;

const APIS: [path: string, schema: string, refused: Readonly<Record<string, Refusal>>][] = [
  ['/v1/chat/completions', 'ChatCompletionRequest', REFUSED],
  ['/v1/completions', 'CompletionRequest', { ...REFUSED, ...REFUSED_TEXT }],
  ['/v1/messages', 'MessagesRequest', REFUSED_MESSAGES],
  ['/v1/responses', 'ResponsesRequest', REFUSED_RESPONSES],
];

function fieldsOf(schema: string, refused: Readonly<Record<string, Refusal>>): Field[] {
  const { schemas } = parse(readFileSync(DOCUMENT, 'utf8')).components;
  const properties = schemas[schema].properties as Record<string, { description?: string }>;
  const known = Object.entries(properties).map(([name, { description = '' }]): Field => {
    return { name, does: IGNORED.test(description) ? 'ignored' : 'honoured', text: description };
  });
  const refusals = Object.entries(refused)
    .filter(([name]) => !Object.hasOwn(properties, name))
    .map(([name, { accepts, advice }]): Field => {
      const but = accepts ? `only ${accepts.map((value) => JSON.stringify(value)).join(', ')} is taken; ` : '';
      return { name, does: 'refused (400)', text: `${but}else: ${advice}.` };
    });
  return [...known, ...refusals];
}

export function fieldsText(): string {
  const tables = APIS.map(([path, schema, refused]) => {
    const rows = fieldsOf(schema, refused).map(({ name, does, text }) => `| \`${name}\` | ${does} | ${cell(text)} |`);
    return [`## POST ${path}`, '', '| field | | |', '|---|---|---|', ...rows].join('\n');
  });
  return [
    '# Request fields',
    'Made from openapi/openapi.yaml and the tables of refusals by `node --import tsx tests/contract/fields.ts`; a test ' +
      'compares. Fields that stand nowhere here are taken, have no effect, and are logged at debug.',
    ...tables,
    '',
  ].join('\n\n');
}

/** README with its table of fields as the contract has them. */
export function withFields(readme: string): string {
  const rows = APIS.flatMap(([path, schema, refused]) => {
    const fields = fieldsOf(schema, refused);
    return (['honoured', 'refused (400)', 'ignored'] as const).map((kind, index) => {
      const names = fields.filter(({ does }) => does === kind).map(({ name }) => `\`${name}\``);
      return `| ${index === 0 ? path : ''} | ${kind} | ${names.join(' ')} |`;
    });
  });
  const table = ['| POST | | request fields |', '|---|---|---|', ...rows].join('\n');
  const [from, to] = [readme.indexOf(MARKS[0]) + MARKS[0].length, readme.indexOf(MARKS[1])];
  if (from < MARKS[0].length || to < from) throw new Error('README.md has lost the marks around its table of fields');
  return readme.slice(0, from) + table + readme.slice(to);
}

function cell(text: string): string {
  return text.replaceAll('|', '\\|').replaceAll('\n', ' ').trim();
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  writeFileSync(FIELDS, fieldsText());
  writeFileSync(README, withFields(readFileSync(README, 'utf8')));
}
