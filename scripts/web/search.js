// Search over `searchIndex`: records of [language, address, page, section, text]. Some hundred records are looked
// through as they are, in milliseconds, so that any part of a word is found, in a script without spaces too.
"use strict";

const CHINESE = /[\u2e80-\u303f\u3400-\u9fff\uff00-\uffef]/;
const MOST = 60;

const results = document.querySelector("#results");
const count = document.querySelector("#count");
const box = document.querySelector("input[type=search]");

// Leaves places where they are: an excerpt is cut from the text by a place in what this gives.
const fold = (text) => text.toLowerCase();

const records = window.searchIndex.map(([lang, address, page, section, text]) => ({
    lang, address, page, section, text,
    titles: fold(`${page} ${section}`),
    folded: fold(text),
}));

const has = (record, term) => record.titles.includes(term) || record.folded.includes(term);

// What is looked for: words, each of them whole or, where a Chinese word stands nowhere as it is, in pairs of characters of
// which half must be there. A Chinese question is one run of characters and may be longer than what the pages say.
function asked(query) {
    const words = fold(query).split(/[\s，。、；：？！]+/).filter(Boolean);
    return words.map((word) => {
        if (word.length < 3 || !CHINESE.test(word) || records.some((record) => has(record, word))) {
            return { pieces: [word], needed: 1 };
        }
        const characters = [...word];
        const pieces = [...new Set(characters.slice(1).map((second, i) => characters[i] + second))];
        return { pieces, needed: Math.ceil(pieces.length / 2) };
    });
}

function matches(record, words) {
    return words.every(({ pieces, needed }) => pieces.filter((piece) => has(record, piece)).length >= needed);
}

// Whether the term stands there on its own: `train` does not in `train_steps`.
function isWord(text, term) {
    const inWord = /[\w]/;
    for (let at = text.indexOf(term); at >= 0; at = text.indexOf(term, at + 1)) {
        if (!inWord.test(text[at - 1] ?? " ") && !inWord.test(text[at + term.length] ?? " ")) {
            return true;
        }
    }
    return false;
}

function score(record, wanted) {
    let sum = { [results.dataset.lang]: 30, library: 20 }[record.lang] ?? 0;
    for (const term of wanted) {
        if (has(record, term)) {
            sum += 10;
        }
        if (isWord(record.folded, term)) {
            sum += 15;
        }
        sum += Math.min(record.folded.split(term).length - 1, 5);
        if (record.titles.includes(term)) {
            sum += 20;
        }
        if (fold(record.section) === term || fold(record.page).split(" ")[0] === term) {
            sum += 30;
        }
    }
    return sum;
}

// The text around the first place that was found, with what was found marked.
function excerpt(record, wanted) {
    const places = wanted.map((term) => record.folded.indexOf(term)).filter((place) => place >= 0);
    const start = Math.max(0, Math.min(...places, record.text.length) - 60);
    const from = places.length ? start : 0;
    const text = record.text.slice(from, from + 200);
    const paragraph = document.createElement("p");
    paragraph.append(from > 0 ? "… " : "", ...marked(text, wanted), from + 200 < record.text.length ? " …" : "");
    return paragraph;
}

function marked(text, wanted) {
    const folded = fold(text);
    const found = new Array(text.length).fill(false);
    for (const term of wanted) {
        for (let at = folded.indexOf(term); at >= 0; at = folded.indexOf(term, at + 1)) {
            found.fill(true, at, at + term.length);
        }
    }
    const parts = [];
    for (let from = 0, to = 0; from < text.length; from = to) {
        while (to < text.length && found[to] === found[from]) {
            to += 1;
        }
        parts.push(found[from] ? mark(text.slice(from, to)) : text.slice(from, to));
    }
    return parts;
}

function mark(text) {
    const element = document.createElement("mark");
    element.textContent = text;
    return element;
}

function item(record, wanted) {
    const entry = document.createElement("li");
    const link = document.createElement("a");
    link.href = `../${record.address}`;
    const section = record.section && record.section !== record.page ? ` › ${record.section}` : "";
    link.append(...marked(record.page + section, wanted));
    entry.append(link, excerpt(record, wanted));
    entry.lang = record.lang === "zh" ? "zh-CN" : "en";
    return entry;
}

function search() {
    const words = asked(box.value);
    const wanted = words.flatMap(({ pieces }) => pieces);
    results.replaceChildren();
    count.textContent = "";
    if (wanted.length === 0) {
        return;
    }
    const found = records.filter((record) => matches(record, words))
        .map((record) => ({ record, points: score(record, wanted) }))
        .sort((a, b) => b.points - a.points);
    const { none, found: some, first } = results.dataset;
    count.textContent = found.length === 0 ? none : some.replace("{}", found.length);
    if (found.length > MOST) {
        count.textContent += ` (${first.replace("{}", MOST)})`;
    }
    results.append(...found.slice(0, MOST).map(({ record }) => item(record, wanted)));
}

box.value = new URLSearchParams(location.search).get("q") ?? "";
box.addEventListener("input", search);
box.form.addEventListener("submit", (event) => event.preventDefault());
search();
