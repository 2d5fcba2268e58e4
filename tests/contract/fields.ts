/** Writes server/api/FIELDS.md from the contract: `node --import tsx tests/contract/fields.ts`. */
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';
import { REFUSED, REFUSED_TEXT } from '../../server/api/unsupported.js';
import { DOCUMENT } from './harness.js';

export const FIELDS = new URL('../../server/api/FIELDS.md', import.meta.url);

interface Refusal {
  accepts?: readonly unknown[];
  advice: string;
}

/** Descriptions of fields that are taken and do nothing begin with this word. */
const IGNORED = /^Accepted[;,.]/;

export function fieldsText(): string {
  const { schemas } = parse(readFileSync(DOCUMENT, 'utf8')).components;
  const table = (title: string, schema: string, refused: Readonly<Record<string, Refusal>>): string => {
    const properties = schemas[schema].properties as Record<string, { description?: string }>;
    const rows = Object.entries(properties).map(([name, { description = '' }]) => {
      const does = IGNORED.test(description) ? 'ignored' : 'honoured';
      return [name, does, description] as const;
    });
    const refusals = Object.entries(refused)
      .filter(([name]) => !Object.hasOwn(properties, name))
      .map(([name, { accepts, advice }]) => {
        const but = accepts ? `only ${accepts.map((value) => JSON.stringify(value)).join(', ')} is taken; ` : '';
        return [name, 'refused (400)', `${but}else: ${advice}.`] as const;
      });
    const lines = [...rows, ...refusals].map(([name, does, text]) => `| \`${name}\` | ${does} | ${cell(text)} |`);
    return [`## ${title}`, '', '| field | | |', '|---|---|---|', ...lines].join('\n');
  };
  return [
    '# Request fields',
    'Made from openapi/openapi.yaml and unsupported.ts by `node --import tsx tests/contract/fields.ts`; a test compares. ' +
      'Fields that stand nowhere here are taken, have no effect, and are logged at debug.',
    table('POST /v1/chat/completions', 'ChatCompletionRequest', REFUSED),
    table('POST /v1/completions', 'CompletionRequest', { ...REFUSED, ...REFUSED_TEXT }),
    '',
  ].join('\n\n');
}

function cell(text: string): string {
  return text.replaceAll('|', '\\|').replaceAll('\n', ' ').trim();
}

if (process.argv[1] === fileURLToPath(import.meta.url)) writeFileSync(FIELDS, fieldsText());
