//! "Did you mean": the known name that is nearest to a wrong one.

/// The candidate that takes the fewest edits to become `word`, if a third of its letters or fewer are wrong. Otherwise the first
/// one of which `word` is a part between dashes: `queues` of `num-queues`.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let candidates: Vec<&str> = candidates.into_iter().collect();
    let most = |candidate: &str| (candidate.len() / 3).max(1);
    let letters = word.chars().count();
    let near = candidates
        .iter()
        // There are at least as many edits as letters too many or too few. A word may be as long as a file.
        .filter(|candidate| letters.abs_diff(candidate.chars().count()) <= most(candidate))
        .map(|candidate| (distance(word, candidate), *candidate))
        .filter(|(edits, candidate)| *edits <= most(candidate))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate);
    near.or_else(|| candidates.into_iter().find(|candidate| candidate.split('-').any(|part| part == word)))
}

/// Letters to insert, delete, change or swap with their neighbour until `a` is `b` (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before = vec![];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let mut edits = (last[j - 1] + usize::from(a[i - 1] != b[j - 1])).min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                let swapped: &Vec<usize> = &before;
                edits = edits.min(swapped[j - 2] + 1);
            }
            row.push(edits);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_counted() {
        let check = |a, b, edits| assert_eq!((distance(a, b), distance(b, a)), (edits, edits), "{a} and {b}");
        check("", "", 0);
        check("", "path", 4);
        check("path", "path", 0);
        check("paths", "path", 1);
        check("pahts", "paths", 1);
        check("num_queues", "num-queue", 2);
        check("kitten", "sitting", 3);
    }

    #[test]
    fn what_is_far_off_is_not_suggested() {
        let names = ["io_uring", "vhost-user", "memory", "null"];
        let check = |word, near| assert_eq!(nearest(word, names), near, "{word}");
        check("io-urnig", Some("io_uring"));
        check("vhostuser", Some("vhost-user"));
        check("nul", Some("null"));
        check("mem", None);
        check("disk.img", None);
        check("", None);
        // In no time: this is compared with nothing.
        check(&"queue".repeat(4 << 20), None);
    }
}
