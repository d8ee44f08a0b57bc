// Runs before the body is there, so that a page does not flash in the wrong colours.
"use strict";

const root = document.documentElement;

// A browser may refuse storage, above all for pages from a disk: the choice is then for this page.
function stored() {
    try {
        return localStorage.getItem("theme");
    } catch {
        return null;
    }
}

function store(theme) {
    try {
        localStorage.setItem("theme", theme);
    } catch {
        // The page has it.
    }
}

const wanted = stored();
if (wanted === "light" || wanted === "dark") {
    root.dataset.theme = wanted;
}

function isDark() {
    if (root.dataset.theme) {
        return root.dataset.theme === "dark";
    }
    return matchMedia("(prefers-color-scheme: dark)").matches;
}

document.addEventListener("DOMContentLoaded", () => {
    document.querySelector(".theme")?.addEventListener("click", () => {
        root.dataset.theme = isDark() ? "light" : "dark";
        store(root.dataset.theme);
    });

    // Beside the text where there is room, folded above it where there is not.
    const contents = document.querySelector("details.contents");
    if (contents) {
        const wide = matchMedia("(min-width: 72rem)");
        const unfold = () => { contents.open = wide.matches; };
        wide.addEventListener("change", unfold);
        unfold();
    }

    // What is wider than its place scrolls by the keyboard, too.
    for (const element of document.querySelectorAll("pre, .table, .output, .output div")) {
        if (element.scrollWidth > element.clientWidth && getComputedStyle(element).overflowX === "auto") {
            element.tabIndex = 0;
        }
    }

    document.addEventListener("keydown", (event) => {
        const typing = event.target.closest("input, textarea");
        const box = document.querySelector("input[type=search]");
        if (event.key === "/" && !typing && box) {
            event.preventDefault();
            box.focus();
        }
    });
});
