//! Questions to the user of a cell or a terminal.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    os::fd::AsRawFd,
};

use crate::error::{Error, Result};

// evcxr's own markers (crate evcxr_input 1.0), which both kernels turn into a question.
const ASK: &str = "EVCXR_INPUT_REQUEST:";
const ASK_PASSWORD: &str = "EVCXR_INPUT_REQUEST_PASSWORD:";

/// Asks for one line of text: in a notebook with a field under the cell, elsewhere at the terminal.
///
/// ```no_run
/// let title = qlora_nb::display::input("Title of the poem: ")?;
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
///
/// # Errors
/// Where nobody can answer: a notebook that runs without a front end, a closed stdin.
pub fn input(prompt: &str) -> Result<String> {
    ask(prompt, false)
}

/// [`input`] for what nobody should read over your shoulder.
///
/// # Errors
/// Those of [`input`].
pub fn input_password(prompt: &str) -> Result<String> {
    ask(prompt, true)
}

fn ask(prompt: &str, secret: bool) -> Result<String> {
    let in_cell = super::in_cell();
    // Printing the question ends what stands on the line; a closed pipe shows when reading.
    let _ = write_question(&mut io::stdout().lock(), prompt, secret, in_cell);
    let stdin = io::stdin();
    let _silence = (secret && !in_cell && stdin.is_terminal()).then(Silence::begin);
    read_answer(&mut stdin.lock(), prompt)
}

fn write_question(out: &mut impl Write, prompt: &str, secret: bool, in_cell: bool) -> io::Result<()> {
    if in_cell {
        // The marker is one line: of a longer question only the last line is asked.
        let (text, question) = prompt.rsplit_once('\n').map_or((None, prompt), |(text, last)| (Some(text), last));
        if let Some(text) = text {
            writeln!(out, "{text}")?;
        }
        writeln!(out, "{}{question}", if secret { ASK_PASSWORD } else { ASK })?;
    } else {
        write!(out, "{prompt}")?;
    }
    out.flush()
}

fn read_answer(from: &mut impl BufRead, prompt: &str) -> Result<String> {
    let mut answer = String::new();
    if from.read_line(&mut answer).map_err(Error::io("read", "stdin"))? == 0 {
        let question = format!("the answer to {prompt:?}");
        let remedy = "run the cell in a front end that can ask, or put the text into the cell";
        return Err(Error::argument(&question, "the end of the input", "a line of text", remedy));
    }
    Ok(answer.trim_end_matches(['\n', '\r']).to_owned())
}

/// While it lives the terminal does not show what is typed.
struct Silence(Option<libc::termios>);

impl Silence {
    fn begin() -> Self {
        let fd = io::stdin().as_raw_fd();
        // SAFETY: termios is plain data, valid for both calls. Where one fails the text shows.
        unsafe {
            let mut before: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(fd, &mut before) != 0 {
                return Self(None);
            }
            let mut silent = before;
            silent.c_lflag &= !libc::ECHO;
            libc::tcsetattr(fd, libc::TCSANOW, &silent);
            Self(Some(before))
        }
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: as above. The line break that was typed did not show either.
            unsafe { libc::tcsetattr(io::stdin().as_raw_fd(), libc::TCSANOW, before) };
            super::line("");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(prompt: &str, secret: bool, in_cell: bool) -> String {
        let mut out = Vec::new();
        write_question(&mut out, prompt, secret, in_cell).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_cell_asks_by_evcxrs_marker_and_a_terminal_by_the_prompt() {
        assert_eq!(question("Name: ", false, true), "EVCXR_INPUT_REQUEST:Name: \n");
        assert_eq!(question("Token: ", true, true), "EVCXR_INPUT_REQUEST_PASSWORD:Token: \n");
        assert_eq!(question("a\nb\nName: ", false, true), "a\nb\nEVCXR_INPUT_REQUEST:Name: \n");
        assert_eq!(question("Name: ", false, false), "Name: ");
    }

    #[test]
    fn an_answer_is_one_line_as_it_was_typed() {
        let mut from = io::Cursor::new(" 江上秋夜 \r\n\nrest");
        assert_eq!(read_answer(&mut from, "Title").unwrap(), " 江上秋夜 ");
        assert_eq!(read_answer(&mut from, "Title").unwrap(), "");
        assert_eq!(read_answer(&mut from, "Title").unwrap(), "rest");
        let error = read_answer(&mut from, "Title: ").unwrap_err().to_string();
        assert!(error.contains("the answer to \"Title: \" = the end of the input"), "{error}");
        assert!(error.contains("what to do"), "{error}");
    }
}
